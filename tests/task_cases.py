"""A tiny model and a batch of four examples for every task, and each output worked out by hand.

What is worked out by hand is written anew from the head's own loss or from the formula in the docstring, without the
package's outputs, calls or table.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

N = 4
TEXT = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
        "max_position_embeddings": 32}  # fmt: skip
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
          "image_size": 32, "patch_size": 8}  # fmt: skip


@dataclass
class Case:
    """A task's model and batch.

    Attributes:
        task: the name that the package should find.
        output: what "auto" should stand for.
        build: makes the model.
        batch: makes the batch, of four examples.
        by_hand: (model, batch) -> the output, worked out anew.
        exact: whether components reach the output through hooks for every example by itself.
    """

    task: str
    output: str
    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Any]]
    by_hand: Callable[[nn.Module, dict[str, Any]], Tensor]


def rows(batch: dict[str, Any]) -> list[dict[str, Any]]:
    return [{name: value[i : i + 1] for name, value in batch.items()} for i in range(N)]


def minus_own_loss(model: nn.Module, batch: dict[str, Any], factor: float = 1.0) -> Tensor:
    """Minus the head's own training loss, example by example."""
    return torch.stack([-factor * model(**row).loss.float() for row in rows(batch)])


def margins(logits: Tensor, targets: Tensor) -> Tensor:
    right = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    others = logits.masked_fill(F.one_hot(targets, logits.shape[-1]).bool(), float("-inf"))
    return right - others.max(-1).values


def token_margins(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean margin over the positions whose target is no -100."""
    found = []
    for row, wanted in zip(logits, targets, strict=True):
        real = wanted != -100
        found.append(margins(row[real], wanted[real]).mean())
    return torch.stack(found)


def words(n: int = 9, vocab: int = 40, first: int = 5) -> Tensor:
    return torch.randint(first, vocab, (N, n))


def text(with_pair: bool = False) -> dict[str, Tensor]:
    attended = torch.ones(N, 9, dtype=torch.long)
    attended[1, 6:] = 0
    batch = {"input_ids": words(), "attention_mask": attended}
    if with_pair:
        batch["token_type_ids"] = (torch.arange(9) > 4).long().expand(N, 9).clone()
    return batch


def some(labels: Tensor, *places: tuple[int, int]) -> Tensor:
    """Labels at a few places only."""
    kept = torch.full_like(labels, -100)
    for row in range(N):
        for place in places[row % len(places)]:
            kept[row, place] = labels[row, place]
    return kept


def pixels(size: int = 32, channels: int = 3) -> Tensor:
    coarse = torch.randn(N, channels, 4, 4)
    return F.interpolate(coarse, size=(size, size), mode="bilinear") + 0.3 * torch.randn(N, channels, size, size)


def sound(length: int = 1600) -> Tensor:
    return torch.randn(N, length)


def classes(n: int = 3) -> Tensor:
    return torch.tensor([0, 2, 1, 2]) % n


# ------------------------------------------------------------------------------------------------------------- models


def bert(head: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(tf, f"Bert{head}")(tf.BertConfig(**TEXT, pad_token_id=0, **options))


def gpt2() -> nn.Module:
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 40, "n_positions": 32}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def bart_decoder() -> nn.Module:
    sizes = {"vocab_size": 40, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 48}
    sizes |= {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "max_position_embeddings": 32}
    return tf.BartForCausalLM(tf.BartConfig(**sizes))


def t5() -> nn.Module:
    sizes = {"vocab_size": 40, "d_model": 32, "d_kv": 16, "num_heads": 2, "num_layers": 2, "d_ff": 48}
    return tf.T5ForConditionalGeneration(tf.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))


def whisper() -> nn.Module:
    sizes = {"vocab_size": 40, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48}
    sizes |= {"decoder_ffn_dim": 48, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 8}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    limits = {"max_source_positions": 20, "max_target_positions": 16, "suppress_tokens": None}
    return tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(**sizes, **special, **limits, begin_suppress_tokens=None, apply_spec_augment=False)
    )


def wav2vec2(head: str) -> Callable[[], nn.Module]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    sizes |= {"conv_dim": (16, 16), "conv_kernel": (10, 8), "conv_stride": (8, 8), "num_feat_extract_layers": 2}
    sizes |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16}
    options = {"vocab_size": 12, "pad_token_id": 0, "num_labels": 3, "apply_spec_augment": False}
    return lambda: getattr(tf, f"Wav2Vec2{head}")(tf.Wav2Vec2Config(**sizes, **options))


def vit(head: str = "ForImageClassification", **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(tf, f"ViT{head}")(tf.ViTConfig(**VISION, **options))


def timm_vit() -> nn.Module:
    import timm

    sizes = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


def videomae() -> nn.Module:
    return tf.VideoMAEForVideoClassification(
        tf.VideoMAEConfig(**VISION, num_frames=4, tubelet_size=2, num_labels=3, use_mean_pooling=True)
    )


def segformer() -> nn.Module:
    sizes = {"depths": [1, 1], "hidden_sizes": [16, 24], "num_attention_heads": [1, 2], "num_encoder_blocks": 2}
    sizes |= {"patch_sizes": [7, 3], "strides": [4, 2], "sr_ratios": [2, 1], "mlp_ratios": [2, 2]}
    return tf.SegformerForSemanticSegmentation(tf.SegformerConfig(**sizes, decoder_hidden_size=16, num_labels=3))


def maskformer() -> nn.Module:
    backbone = tf.SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    decoder = tf.DetrConfig(
        d_model=32, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=48, encoder_layers=1, num_queries=6,
        encoder_attention_heads=2, encoder_ffn_dim=48, use_timm_backbone=False, backbone_config=tf.ResNetConfig(),
    )  # fmt: skip
    return tf.MaskFormerForInstanceSegmentation(
        tf.MaskFormerConfig(
            backbone_config=backbone, decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32, num_labels=3
        )
    )


def yolos() -> nn.Module:
    sizes = {**VISION, "image_size": [32, 32]}
    return tf.YolosForObjectDetection(tf.YolosConfig(**sizes, num_detection_tokens=6, num_labels=3))


def detr() -> nn.Module:
    backbone = tf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 6, "num_labels": 3}
    return tf.DetrForObjectDetection(tf.DetrConfig(**sizes, use_timm_backbone=False, backbone_config=backbone))


def sam() -> nn.Module:
    vision = {**VISION, "mlp_dim": 48, "output_channels": 16, "window_size": 2, "global_attn_indexes": [1]}
    vision |= {"num_pos_feats": 8}
    prompts = {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 16,
        "mlp_dim": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
    }
    return tf.SamModel(
        tf.SamConfig(
            vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config={**decoder, "iou_head_depth": 2}
        )
    )


def glpn() -> nn.Module:
    sizes = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 24], "num_attention_heads": [1, 1, 2, 2]}
    sizes |= {"sr_ratios": [2, 1, 1, 1], "mlp_ratios": [2, 2, 2, 2], "decoder_hidden_size": 16}
    return tf.GLPNForDepthEstimation(tf.GLPNConfig(**sizes))


def clip() -> nn.Module:
    words = {**TEXT, "bos_token_id": 1, "eos_token_id": 2}
    return tf.CLIPModel(tf.CLIPConfig(text_config=words, vision_config=VISION, projection_dim=16))


def patchtst() -> nn.Module:
    sizes = {"d_model": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24}
    return tf.PatchTSTForPrediction(
        tf.PatchTSTConfig(**sizes, num_input_channels=2, context_length=16, prediction_length=4, patch_length=4,
                          patch_stride=4, loss="mse")
    )  # fmt: skip


def time_series_transformer() -> nn.Module:
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    lengths = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1}
    return tf.TimeSeriesTransformerForPrediction(tf.TimeSeriesTransformerConfig(**sizes, **heads, **lengths))


def decision_transformer() -> nn.Module:
    sizes = {"state_dim": 5, "act_dim": 3, "hidden_size": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return tf.DecisionTransformerModel(tf.DecisionTransformerConfig(**sizes, max_ep_len=20))


def swin2sr() -> nn.Module:
    sizes = {"image_size": 16, "patch_size": 1, "embed_dim": 24, "depths": [1, 1], "num_heads": [2, 2]}
    return tf.Swin2SRForImageSuperResolution(tf.Swin2SRConfig(**sizes, window_size=4, upscale=2, mlp_ratio=2.0))


def llava() -> nn.Module:
    from transformers import LlamaConfig

    vision = tf.CLIPVisionConfig(**VISION, projection_dim=16)
    words = LlamaConfig(**TEXT, num_key_value_heads=2, pad_token_id=0)
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=vision, text_config=words, image_token_id=39, vision_feature_layer=-1)
    )


def qwen() -> nn.Module:
    words = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    words |= {"intermediate_size": 48, "vocab_size": 40, "rope_parameters": rope}
    sees = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    sees |= {"spatial_merge_size": 2, "temporal_patch_size": 1}
    tokens = {"image_token_id": 38, "vision_start_token_id": 36, "vision_end_token_id": 37, "video_token_id": 39}
    config = tf.Qwen2VLConfig(text_config=words, vision_config=sees, **tokens)
    return tf.Qwen2VLForConditionalGeneration(config)


def unet() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=8, num_class_embeds=3,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- batches


def spans() -> dict[str, Tensor]:
    return {**text(True), "start_positions": torch.tensor([1, 2, 4, 3]), "end_positions": torch.tensor([3, 2, 6, 5])}


def choices() -> dict[str, Tensor]:
    attended = torch.ones(N, 3, 7, dtype=torch.long)
    attended[1, 2, 4:] = 0
    return {"input_ids": torch.randint(5, 40, (N, 3, 7)), "attention_mask": attended, "labels": classes()}


def objects() -> dict[str, Any]:
    labels = [
        {
            "class_labels": torch.tensor([i % 3, (i + 1) % 3][: 1 + i % 2]),
            "boxes": (0.3 + 0.4 * torch.rand(1 + i % 2, 4)),
        }
        for i in range(N)
    ]
    return {"pixel_values": pixels(), "labels": labels}


def segments() -> dict[str, Any]:
    masks = []
    for i in range(N):
        mask = torch.zeros(2, 32, 32)
        mask[0, : 10 + i], mask[1, 10 + i :] = 1, 1
        masks.append(mask)
    return {
        "pixel_values": pixels(),
        "mask_labels": masks,
        "class_labels": [torch.tensor([i % 3, 2]) for i in range(N)],
    }


def answers() -> dict[str, Tensor]:
    """Prompts of 5 tokens, answers of 2 (the last one 1) and foils of 1 or 2."""
    ids, foils = words(7), words(7)
    foils[:, :5] = ids[:, :5]
    labels, wrong = some(ids, (5, 6), (5, 6), (5, 6), (5,)), some(foils, (5,), (5, 6))
    masks = torch.ones(N, 7, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": masks, "labels": labels, "foil_input_ids": foils,
            "foil_attention_mask": masks.clone(), "foil_labels": wrong}  # fmt: skip


def pointed() -> dict[str, Tensor]:
    """Images with two points each, and the masks that they stand for."""
    return {
        "pixel_values": pixels(),
        "input_points": 32 * torch.rand(N, 2, 1, 2),
        "labels": (torch.rand(N, 2, 16, 16) > 0.5).float(),
    }


GRIDS = ((1, 4, 4), (1, 4, 8), (1, 8, 4), (1, 8, 8))


def patches() -> dict[str, Any]:
    """A text after an image of each size, padded on the left; the patches are ragged."""
    rows = [[36, *[38] * (h * w // 4), 37, *torch.randint(1, 30, (4,)).tolist()] for _, h, w in GRIDS]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    labels = torch.where(ids < 30, ids, -100).masked_fill(mask == 0, -100)
    texts = {"input_ids": ids, "attention_mask": mask, "labels": labels, "mm_token_type_ids": (ids == 38).long()}
    images = [torch.randn(h * w, 3 * 4 * 4) for _, h, w in GRIDS]
    return {**texts, "pixel_values": images, "image_grid_thw": list(torch.tensor(GRIDS).split(1))}


def series() -> dict[str, Tensor]:
    return {"past_values": torch.randn(N, 16, 2).cumsum(1), "future_values": torch.randn(N, 4, 2)}


def long_series() -> dict[str, Tensor]:
    return {
        "past_values": torch.randn(N, 10).cumsum(1), "past_time_features": torch.randn(N, 10, 1),
        "past_observed_mask": torch.ones(N, 10), "future_values": torch.randn(N, 4),
        "future_time_features": torch.randn(N, 4, 1),
    }  # fmt: skip


def decisions() -> dict[str, Tensor]:
    attended = torch.ones(N, 6, dtype=torch.long)
    attended[1, :2] = 0
    return {
        "states": torch.randn(N, 6, 5), "actions": torch.randn(N, 6, 3), "rewards": torch.randn(N, 6, 1),
        "returns_to_go": torch.randn(N, 6, 1), "timesteps": torch.arange(6).expand(N, 6).clone(),
        "attention_mask": attended, "labels": torch.randn(N, 6, 3),
    }  # fmt: skip


def noisy() -> dict[str, Tensor]:
    return {"sample": torch.randn(N, 1, 8, 8), "timestep": torch.tensor([3, 400, 70, 900]), "class_labels": classes(),
            "noise": torch.randn(N, 1, 8, 8)}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- by hand


def without(batch: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in (names or ("labels",))}


def classifier(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return margins(model(**without(batch)).logits, batch["labels"])


def every_position(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return token_margins(model(**without(batch)).logits, batch["labels"])


def decoded(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return token_margins(model(**batch).logits, batch["labels"])


def difference(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    def log_prob(ids: Tensor, labels: Tensor) -> Tensor:
        sums = []
        for row, wanted in zip(ids, labels, strict=True):
            last = int((wanted != -100).nonzero()[-1])  # what comes after must not matter
            said = model(input_ids=row[None, : last + 1]).logits[0].log_softmax(-1)
            sums.append(sum(said[t - 1, wanted[t]] for t in (wanted != -100).nonzero().flatten().tolist()))
        return torch.stack(sums)

    right = log_prob(batch["input_ids"], batch["labels"])
    return right - log_prob(batch["foil_input_ids"], batch["foil_labels"])


def spanned(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    found = model(**without(batch, "start_positions", "end_positions"))
    ends = [(found.start_logits, batch["start_positions"]), (found.end_logits, batch["end_positions"])]
    return torch.stack([margins(*end) for end in ends]).min(0).values


def detected(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    found, values = model(pixel_values=batch["pixel_values"]), []
    for i, label in enumerate(batch["labels"]):
        best = []
        for one, box in zip(label["class_labels"], label["boxes"], strict=True):
            of_queries = []
            for logits, (x, y, w, h) in zip(found.logits[i], found.pred_boxes[i], strict=True):
                left, right = (
                    torch.maximum(x - w / 2, box[0] - box[2] / 2),
                    torch.minimum(x + w / 2, box[0] + box[2] / 2),
                )
                top, low = torch.maximum(y - h / 2, box[1] - box[3] / 2), torch.minimum(y + h / 2, box[1] + box[3] / 2)
                inside = (right - left).clamp_min(0) * (low - top).clamp_min(0)
                iou = inside / (w * h + box[2] * box[3] - inside)
                of_queries.append(logits.softmax(-1)[one].log() + iou.clamp_min(1e-6).log())
            best.append(torch.stack(of_queries).max())
        values.append(torch.stack(best).mean())
    return torch.stack(values)


def after_images(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """All images in one tensor of patches, as the processor gives them."""
    flat = {name: torch.cat(batch[name]) for name in ("pixel_values", "image_grid_thw")}
    logits = model(**{**without(batch), **flat}).logits
    return token_margins(logits[:, :-1], batch["labels"][:, 1:])


def masked_by_points(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    found, values = model(**without(batch)).pred_masks, []
    for masks, true in zip(found, batch["labels"], strict=True):
        each = [
            max((t * F.logsigmoid(m) + (1 - t) * F.logsigmoid(-m)).mean() for m in of_prompt)
            for of_prompt, t in zip(masks, true, strict=True)
        ]
        values.append(sum(each) / len(each))
    return torch.stack(values)


def segmented(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    logits = F.interpolate(
        model(pixel_values=batch["pixel_values"]).logits, size=batch["labels"].shape[1:], mode="bilinear"
    )
    targets = batch["labels"].masked_fill(batch["labels"] == 255, -100).flatten(1)
    return token_margins(logits.flatten(2).transpose(1, 2), targets)


def regions(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    found, values = model(pixel_values=batch["pixel_values"]), []
    for i in range(N):
        each = [c.softmax(-1)[:-1, None, None] * m.sigmoid() for c, m in
                zip(found.class_queries_logits[i], found.masks_queries_logits[i], strict=True)]  # fmt: skip
        scores = F.interpolate(sum(each)[None], size=(32, 32), mode="bilinear")[0]
        of_segments = [scores[c][m.bool()].clamp_min(1e-6).log().mean() for c, m in
                       zip(batch["class_labels"][i], batch["mask_labels"][i], strict=True)]  # fmt: skip
        values.append(torch.stack(of_segments).mean())
    return torch.stack(values)


def depths(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    found = model(pixel_values=batch["pixel_values"]).predicted_depth
    known = batch["labels"] > 0
    return torch.stack([-(found[i] - batch["labels"][i]).abs()[known[i]].mean() for i in range(N)])


def matched(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    found = model(**batch)
    a, b = (F.normalize(x, dim=-1) for x in (found.image_embeds, found.text_embeds))
    return model.logit_scale.exp() * (a * b).sum(-1)


def zero_shot(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    logits = []
    for row in rows(batch):
        logits.append(model(pixel_values=row["pixel_values"], input_ids=row["input_ids"][0]).logits_per_image[0])
    return margins(torch.stack(logits), batch["labels"])


def alike(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    def mean(ids: Tensor, mask: Tensor) -> Tensor:
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        return torch.stack([h[m.bool()].mean(0) for h, m in zip(hidden, mask, strict=True)])

    a = mean(batch["input_ids"], batch["attention_mask"])
    b = mean(batch["pair_input_ids"], batch["pair_attention_mask"])
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def acted(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    errors = (model(**without(batch)).action_preds - batch["labels"]).square().mean(-1)
    return torch.stack([-e[m.bool()].mean() for e, m in zip(errors, batch["attention_mask"], strict=True)])


def denoised(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    said = model(batch["sample"], batch["timestep"], class_labels=batch["class_labels"]).sample
    return -(said - batch["noise"]).square().mean((1, 2, 3))


def preferred(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return (model(batch["input_ids"]).logits - model(batch["rejected_input_ids"]).logits)[:, 0]


MASKED = ((1, 4), (2,), (3, 5), (1, 2, 7))
TOKEN_LABELS = ((0, 1, 2, 3, 4, 5, 6, 7, 8), (0, 1, 2, 3, 4, 5))

CASES: dict[str, Case] = {
    "text": Case("text_classification", "margin", bert("ForSequenceClassification", num_labels=3),
                 lambda: {**text(True), "labels": classes()}, classifier),
    "regression": Case("text_classification", "regression", bert("ForSequenceClassification", num_labels=1),
                       lambda: {**text(), "labels": torch.randn(N)}, minus_own_loss),
    "multi_label": Case("text_classification", "multi_label", bert("ForSequenceClassification", num_labels=3),
                        lambda: {**text(), "labels": (torch.rand(N, 3) > 0.5).float()}, minus_own_loss),
    "score": Case("text_classification", "score", bert("ForSequenceClassification", num_labels=1), text,
                  lambda model, batch: model(**batch).logits[:, 0]),
    "preference": Case("text_classification", "preference", bert("ForSequenceClassification", num_labels=1),
                       lambda: {"input_ids": words(), "rejected_input_ids": words()}, preferred),
    "next_sentence": Case("next_sentence_prediction", "margin", bert("ForNextSentencePrediction"),
                          lambda: {**text(True), "labels": classes(2)}, classifier),
    "multiple_choice": Case("multiple_choice", "margin", bert("ForMultipleChoice"), choices, classifier),
    "tokens": Case("token_classification", "token_margin", bert("ForTokenClassification", num_labels=4),
                   lambda: {**text(), "labels": some(torch.randint(0, 4, (N, 9)), *TOKEN_LABELS)}, every_position),
    "masked_lm": Case("masked_lm", "token_margin", bert("ForMaskedLM"),
                      lambda: {**text(), "labels": some(words(), *MASKED)}, every_position),
    "causal_lm": Case("causal_lm", "token_margin", gpt2, lambda: {"input_ids": words()},
                      lambda model, batch: token_margins(model(**batch).logits[:, :-1], batch["input_ids"][:, 1:])),
    # Trained on labels that are moved already, unlike the others of its mapping.
    "decoder": Case("causal_lm", "token_margin", bart_decoder, lambda: {**text(), "labels": some(words(), *MASKED)},
                    lambda model, batch: every_position(model, {**batch, "use_cache": False})),
    "answers": Case("causal_lm", "answer_difference", gpt2, answers, difference),
    "seq2seq": Case("seq2seq_lm", "token_margin", t5,
                    lambda: {**text(), "labels": some(words(5), (0, 1, 2, 3, 4), (0, 1, 2))}, decoded),
    "speech": Case("seq2seq_lm", "token_margin", whisper,
                   lambda: {"input_features": torch.randn(N, 8, 40), "labels": words(5)}, decoded),
    "image_text": Case("image_text_lm", "token_margin", llava,
                       lambda: {"input_ids": torch.cat([torch.full((N, 16), 39), words(5, 38)], 1),
                                "pixel_values": pixels(),
                                "labels": torch.cat([torch.full((N, 16), -100), words(5, 38)], 1)},
                       lambda model, batch: token_margins(model(**batch).logits[:, :-1], batch["labels"][:, 1:])),
    "patches": Case("image_text_lm", "token_margin", qwen, patches, after_images),
    "question_answering": Case("question_answering", "span_margin", bert("ForQuestionAnswering"), spans, spanned),
    "ctc": Case("ctc", "ctc_log_prob", wav2vec2("ForCTC"),
                lambda: {"input_values": sound(),
                         "labels": some(torch.randint(1, 12, (N, 5)), (0, 1, 2, 3, 4), (0, 1))},
                minus_own_loss),
    "frames": Case("frame_classification", "token_margin", wav2vec2("ForAudioFrameClassification"),
                   lambda: {"input_values": sound(), "labels": F.one_hot(torch.randint(0, 3, (N, 24)), 3).float()},
                   lambda model, batch: token_margins(model(batch["input_values"]).logits, batch["labels"].argmax(-1))),
    "audio": Case("audio_classification", "margin", wav2vec2("ForSequenceClassification"),
                  lambda: {"input_values": sound(), "labels": classes()}, classifier),
    "image": Case("image_classification", "margin", vit(num_labels=3),
                  lambda: {"pixel_values": pixels(), "labels": classes()}, classifier),
    "timm": Case("image_classification", "margin", timm_vit, lambda: {"pixel_values": pixels(), "labels": classes()},
                 lambda model, batch: margins(model(batch["pixel_values"]), batch["labels"])),
    "video": Case("video_classification", "margin", videomae,
                  lambda: {"pixel_values": torch.randn(N, 4, 3, 32, 32), "labels": classes()}, classifier),
    "detection": Case("object_detection", "detection", yolos, objects, detected),
    "detr": Case("object_detection", "detection", detr, objects, detected),
    "points": Case("mask_generation", "mask_log_prob", sam, pointed, masked_by_points),
    "semantic": Case("semantic_segmentation", "pixel_margin", segformer,
                     lambda: {"pixel_values": pixels(), "labels": torch.randint(0, 4, (N, 32, 32)) * 85 % 256 % 85
                              + 255 * (torch.rand(N, 32, 32) > 0.9)}, segmented),
    "universal": Case("universal_segmentation", "segment_log_prob", maskformer, segments, regions),
    "depth": Case("depth_estimation", "depth", glpn,
                  lambda: {"pixel_values": pixels(), "labels": torch.rand(N, 32, 32) * (torch.rand(N, 32, 32) > 0.2)},
                  depths),
    "image_to_image": Case("image_to_image", "reconstruction", swin2sr,
                           lambda: {"pixel_values": pixels(16), "labels": pixels(32)},
                           lambda model, batch: -(model(batch["pixel_values"]).reconstruction - batch["labels"])
                           .square().mean((1, 2, 3))),
    "image_and_text": Case("zero_shot_image_classification", "similarity", clip,
                           lambda: {"pixel_values": pixels(), "input_ids": words()}, matched),
    "zero_shot": Case("zero_shot_image_classification", "margin", clip,
                      lambda: {"pixel_values": pixels(), "input_ids": torch.randint(5, 40, (N, 3, 6)),
                               "labels": classes()},
                      zero_shot),
    "embedding": Case("embedding", "similarity", bert("Model"),
                      lambda: {**text(), **{f"pair_{name}": value for name, value in text().items()}}, alike),
    "series": Case("time_series_prediction", "own_loss", patchtst, series, minus_own_loss),
    "long_series": Case("time_series_prediction", "own_loss", time_series_transformer, long_series, minus_own_loss),
    "decisions": Case("decision", "action", decision_transformer, decisions, acted),
    "denoising": Case("denoising", "denoising", unet, noisy, denoised),
    "pretraining": Case("own_loss", "own_loss", bert("ForPreTraining"),
                        lambda: {**text(), "labels": some(words(), *MASKED), "next_sentence_label": classes(2)},
                        minus_own_loss),
}  # fmt: skip


@functools.cache
def _made(name: str) -> tuple[nn.Module, dict[str, Any]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(name.encode()))
        model, batch = CASES[name].build().eval(), CASES[name].batch()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return model, batch


def made(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model, not to be changed, and the batch of a case."""
    model, batch = _made(name)
    return model, dict(batch)
