"""What exact identity costs, as a share of a default run; and how far two equal forwards are apart.

    python scripts/measure_identity.py [--examples 16] [--write]

Three unlike models: the demo's images through its network, pictures through a ViT of six blocks as wide as ViT-S, and
token sequences through a GPT-2 of four blocks of the real width. Time is the processor's, of one thread. Then every
model runs twice on the same examples: the largest difference of its logits over the largest logit, in two precisions
and with one and two threads, as it is, and with a dropout of a hundredth behind its activations.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

import hf_coar as coar
from hf_coar import models
from hf_coar.data import Identity

RESULT = Path(__file__).resolve().parent / "results" / "identity.md"
DEMO = Path(coar.__file__).parent / "demo"
Case = tuple[nn.Module, dict[str, Tensor], str]


def demo(count: int) -> Case:
    """Real images and the network that was trained on them."""
    model, data = coar.load(DEMO / "model", data=DEMO / "images.parquet", split=f"train[:{count}]", batch_size=count)
    return model, next(iter(data)), "margin"


def vit(count: int) -> Case:
    """As wide as ViT-S, six blocks, pictures of 112 pixels, untrained."""
    import timm

    sizes = {"img_size": 112, "depth": 6, "num_classes": 100}
    batch = {"pixel_values": torch.randn(count, 3, 112, 112), "labels": torch.arange(count) % 100}
    return timm.create_model("vit_small_patch16_224", **sizes).eval(), batch, "margin"


def gpt2(count: int) -> Case:
    """GPT-2's width and vocabulary, four blocks, 64 tokens, untrained."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokens = torch.randint(0, 50257, (count, 64))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return GPT2LMHeadModel(GPT2Config(n_layer=4)).eval(), batch, "token_margin"


CASES: dict[str, tuple[Callable[[int], Case], int]] = {
    "demo": (demo, 4),
    "ViT-S-like": (vit, 1),
    "GPT-2-like": (gpt2, 1),
}


def measured(work: Callable[[], object], repeats: int) -> float:
    """Processor seconds of one call, the least of some."""
    found = []
    for _ in range(repeats):
        begun = time.process_time()
        work()
        found.append(time.process_time() - begun)
    return min(found)


def apart(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """The largest difference of the logits of two forwards, over the largest logit."""
    with models.frozen(model), torch.no_grad():
        first, second = (models.logits(model, batch).double() for _ in range(2))
    return float((first - second).abs().max() / first.abs().max())


@contextmanager
def dropout(model: nn.Module, rate: float) -> Iterator[None]:
    """Inside the block the activations of the model are dropped at random, whatever the mode."""
    kinds = (nn.ReLU, nn.GELU, type(transformers.activations.NewGELUActivation()))
    inner = [module for module in model.modules() if isinstance(module, kinds)]
    hooks = [m.register_forward_hook(lambda m, i, o: nn.functional.dropout(o, rate)) for m in inner]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def repeats(count: int) -> Iterator[str]:
    """Rows of the second table."""
    for name, (build, _) in CASES.items():
        for dtype in (torch.float32, torch.bfloat16):
            model, batch, _ = build(count)
            model = model.to(dtype)
            batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
            for threads in (1, 2):
                torch.set_num_threads(threads)
                plain = apart(model, batch)
                with dropout(model, 0.01):
                    dropped = apart(model, batch)
                word = str(dtype).removeprefix("torch.")
                yield f"| {name} | {word} | {threads} | {plain:.2g} | {dropped:.2g} |"


def share(name: str, n_examples: int, fraction: float) -> str:
    """A row of the first table."""
    build, times = CASES[name]
    count = n_examples * times
    model, batch, output = build(count)
    hashing = measured(lambda: Identity.of_batch(batch), 5) / count
    run = measured(lambda: coar.attribute(model, [batch], output=output, ablated_fraction=fraction, progress=False), 1)
    size = sum(value.nbytes for value in batch.values()) // count
    return f"| {name} | {size:,} | {1e6 * hashing:.1f} | {1e3 * run / count:.1f} | {hashing * count / run:.3%} |"


def main() -> None:
    """Measure, print tables, and write them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--examples", type=int, default=8, help="of the dearer two models; the demo takes four times as many"
    )
    parser.add_argument("--fraction", type=float, default=0.05)
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines: list[str] = []

    def told(*more: str) -> None:
        lines.extend(more)
        print("\n".join(more), flush=True)

    told("| model | bytes an example | hashing, µs | run, ms | share |", "|---|--:|--:|--:|--:|")
    for name in CASES:
        told(share(name, arguments.examples, arguments.fraction))
    told("", "Two forwards of the same examples: the largest difference over the largest logit.", "")
    told("| model | dtype | threads | as it is | dropout |", "|---|---|--:|--:|--:|")
    for row in repeats(4):
        told(row)
    if arguments.write:
        command = "    python scripts/measure_identity.py --write"
        machine = "Machine: two CPU cores, times of the processor, other work going on. GPU: not run."
        RESULT.write_text("\n\n".join(["# Exact identity", command, machine, "\n".join(lines)]) + "\n", "utf-8")


if __name__ == "__main__":
    main()
