"""Outputs: laws over everything that is registered, values worked out by hand, and error messages."""

import inspect
import math
import re
import textwrap
from dataclasses import replace

import pytest
import torch
from output_cases import GIVEN
from torch import nn

import hf_coar as coar
from hf_coar.errors import CoarError, DataError, ModelError
from hf_coar.models import outputs
from hf_coar.runs import preflight

# Which way the outputs of the package that are about a right answer move with its logit.
WITH_THE_RIGHT_LOGIT = {
    "margin": 1, "logit": 1, "log_prob": 1, "loss": -1, "token_margin": 1, "token_log_prob": 1, "answer_log_prob": 1,
    "answer_difference": 1, "span_margin": 1, "span_log_prob": 1, "pixel_margin": 1, "pixel_log_prob": 1,
    "preference": 1,
}  # fmt: skip
TOKEN_OUTPUTS = ("token_margin", "token_log_prob")


def classifier_case(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator).to(dtype)
    return logits, {"labels": torch.tensor([0, 1, 2, 3, 1, 0])}


def language_case(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, 7, generator=generator).to(dtype)
    tokens = torch.randint(0, 7, (6, 5), generator=generator)
    attended = torch.ones(6, 5, dtype=torch.long)
    attended[1, 3:] = 0
    attended[2, :2] = 0
    return logits, {"input_ids": tokens, "attention_mask": attended}


@pytest.mark.parametrize("kind", ["detection.ssdlite320_mobilenet_v3_large", "segmentation.lraspp_mobilenet_v3_large"])
def test_what_has_no_logits_gets_an_output_that_serves(kind):
    """The example in the message, as it stands there, is one number an example."""
    models = pytest.importorskip("torchvision").models
    room, name = kind.split(".")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(getattr(models, room), name)(weights=None, weights_backbone=None, num_classes=3).eval()
    batch = {"inputs": torch.rand(2, 3, 64, 64), "labels": torch.tensor([0, 1])}
    with torch.no_grad(), pytest.raises(ModelError, match="which has no logits") as raised:
        outputs.get("margin").of(model, batch)
    code = re.search(r"output=(outputs\.Output\(.*takes='output'\));", str(raised.value))[1]
    with torch.no_grad():
        values = eval(code, {"outputs": outputs, "torch": torch}).of(model, batch)
    assert values.shape == (2,) and bool(values.isfinite().all())


def given(name, dtype=torch.float32):
    """Six examples of what the output takes."""
    case = GIVEN[name]()
    return replace(case, tensors={n: v.to(dtype) if v.is_floating_point() else v for n, v in case.tensors.items()})


def value(name, case):
    return outputs.get(name)(case.found, case.batch)


@pytest.fixture(params=[*outputs.names(), "entropy"])
def name(request, registering):
    """Every output of the package, and the one that its documentation gives as an example."""
    if request.param not in outputs.names():
        example = inspect.cleandoc(outputs.__doc__).partition("::\n")[2]
        exec(textwrap.dedent(example), {"__name__": "__main__"})
    return request.param


def test_the_outputs_of_the_paper_are_there():
    assert set(outputs.names()) >= set(WITH_THE_RIGHT_LOGIT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_and_dtype(name, dtype):
    values = value(name, given(name, dtype))
    assert values.shape == (6,) and values.dtype == torch.float32
    assert values.isfinite().all()
    assert values.unique().numel() > 3, "an output that does not depend on the example"


def test_a_batch_can_be_split(name):
    case = given(name)
    parts = [value(name, case.take(torch.tensor([i, i + 1]))) for i in (0, 2, 4)]
    assert torch.allclose(torch.cat(parts), value(name, case), atol=1e-6)


def test_order_of_examples_does_not_matter(name):
    case, order = given(name), torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.allclose(value(name, case.take(order)), value(name, case)[order], atol=1e-6)


@pytest.mark.parametrize(("name", "sign"), WITH_THE_RIGHT_LOGIT.items())
def test_outputs_about_the_right_answer_move_with_its_logit(name, sign):
    case = given(name)
    gain = value(name, case.moved(0.5)) - value(name, case)
    assert (sign * gain > 1e-3).all()


def test_a_boundary_is_where_right_turns_into_wrong(name):
    if outputs.get(name).boundary is None:
        return
    above, below = (value(name, given(name).moved(step)) for step in (20, -20))
    assert (above > outputs.get(name).boundary).all() and (below < outputs.get(name).boundary).all()


def test_logits_of_a_plain_dict_are_found():
    """Modules of one's own return dicts; the error said that logits were there and not there."""

    class Named(nn.Linear):
        def forward(self, x):
            return {"features": x, "logits": super().forward(x)}

    model, batch = Named(5, 3), {"x": torch.randn(4, 5), "labels": torch.arange(4) % 3}
    found = coar.attribute(model, [batch], progress=False)
    logits = model(batch["x"])["logits"].detach()
    assert torch.allclose(found.forecast.unablated, outputs.get("margin").function(logits, batch), atol=1e-5)


def test_the_gradient_reaches_the_logits_of_every_example(name):
    case = given(name)
    for tensor in case.tensors.values():
        tensor.requires_grad_(tensor.is_floating_point())
    value(name, case).sum().backward()
    gradients = [tensor.grad for tensor in case.tensors.values() if tensor.is_floating_point()]
    assert (sum(gradient.reshape(6, -1).abs().sum(1) for gradient in gradients) > 0).all()


def test_units_and_docstrings(name):
    output = outputs.get(name)
    assert output.name == name and output.unit
    assert output.function.__doc__ or not output.function.__module__.startswith("hf_coar.")


# ---------------------------------------------------------------------------------------------- values worked by hand

LOGITS = torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, 4.0]])
LABELS = {"labels": torch.tensor([1, 0])}
LOG_PROBS = [3 - math.log(math.e + math.e**3 + math.e**2), -math.log(1 + math.exp(-1) + math.exp(4))]


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("margin", [1.0, -4.0]),
        ("logit", [3.0, 0.0]),
        ("log_prob", LOG_PROBS),
        ("loss", [-x for x in LOG_PROBS]),
    ],
)
def test_classifier_values(which, expected):
    assert outputs.get(which)(LOGITS, LABELS).tolist() == pytest.approx(expected, abs=1e-5)


def test_margin_of_a_tie_is_zero():
    values = outputs.get("margin")(torch.tensor([[2.0, 2.0, 1.0], [2.0, 2.0, 1.0]]), {"labels": torch.tensor([0, 1])})
    assert values.tolist() == [0.0, 0.0]


def test_token_margin_value():
    # Position t predicts token t + 1. Tokens 0, 2, 1: margins 5 - 1 at position 0 and 0 - 7 at position 1: mean -1.5.
    logits = torch.tensor([[[1.0, 0.0, 5.0], [7.0, 0.0, 0.0], [9.0, 9.0, 9.0]]])
    assert outputs.get("token_margin")(logits, {"input_ids": torch.tensor([[0, 2, 1]])}).tolist() == [-1.5]


def test_token_log_prob_value():
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0], [5.0, -5.0]]])
    value = outputs.get("token_log_prob")(logits, {"input_ids": torch.tensor([[0, 1, 0]])})
    assert value.tolist() == pytest.approx([(math.log(0.75) + math.log(0.5)) / 2], abs=1e-6)


# ---------------------------------------------------------------------------------------- padding and ignored labels


@pytest.fixture(params=["left", "right"])
def padded(request):
    """A batch of two sequences of three tokens in a width of six, and which positions predict a real token."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 6, 5, generator=generator)
    attended = torch.tensor([[1, 1, 1, 0, 0, 0]] * 2)
    attended = attended.flip(1) if request.param == "left" else attended
    batch = {"input_ids": torch.randint(0, 5, (2, 6), generator=generator), "attention_mask": attended}
    predicting = [0, 1] if request.param == "right" else [3, 4]
    return logits, batch, predicting


@pytest.mark.parametrize("which", TOKEN_OUTPUTS)
@pytest.mark.parametrize("filler", [1e9, float("nan"), float("-inf")])
def test_logits_at_padding_change_nothing(which, filler, padded):
    logits, batch, predicting = padded
    value = outputs.get(which)(logits, batch)
    for position in set(range(6)) - set(predicting):
        changed = logits.clone()
        changed[:, position] = filler
        assert torch.equal(outputs.get(which)(changed, batch), value), position
    for position in predicting:
        changed = logits.clone()
        changed[:, position, 0] += 3
        assert not torch.isclose(outputs.get(which)(changed, batch), value).any(), position


@pytest.mark.parametrize("which", TOKEN_OUTPUTS)
def test_tokens_at_padding_change_nothing(which, padded):
    logits, batch, _ = padded
    value = outputs.get(which)(logits, batch)
    other = torch.where(batch["attention_mask"] == 1, batch["input_ids"], 4 - batch["input_ids"])
    assert torch.equal(outputs.get(which)(logits, {**batch, "input_ids": other}), value)


@pytest.mark.parametrize("which", TOKEN_OUTPUTS)
def test_padding_gives_what_the_sequence_alone_gives(which, padded):
    logits, batch, predicting = padded
    real = slice(predicting[0], predicting[-1] + 2)
    alone = outputs.get(which)(logits[:, real], {"input_ids": batch["input_ids"][:, real]})
    assert torch.allclose(outputs.get(which)(logits, batch), alone, atol=1e-6)


@pytest.mark.parametrize("which", TOKEN_OUTPUTS)
def test_gradients_at_padding_are_zero_and_finite(which, padded):
    logits, batch, predicting = padded
    logits.requires_grad_()
    outputs.get(which)(logits, batch).sum().backward()
    others = sorted(set(range(6)) - set(predicting))
    assert (logits.grad[:, others] == 0).all() and (logits.grad[:, predicting] != 0).any()


@pytest.mark.parametrize("which", TOKEN_OUTPUTS)
def test_ignored_labels_do_not_count(which):
    logits, batch = language_case()
    tokens = batch["input_ids"]
    labels = tokens.clone()
    labels[:, 2] = -100
    value = outputs.get(which)(logits, {"input_ids": tokens, "labels": labels})
    single = [
        outputs.get(which)(logits[:, i : i + 2], {"input_ids": tokens[:, i : i + 2]}) for i in (0, 2, 3)
    ]  # predictions of positions 1, 3 and 4
    assert torch.allclose(value, torch.stack(single).mean(0), atol=1e-6)


@pytest.mark.parametrize("which", TOKEN_OUTPUTS)
def test_labels_come_before_input_ids(which):
    logits, batch = language_case()
    other = (batch["input_ids"] + 1) % 7
    with_labels = outputs.get(which)(logits, {**batch, "labels": other})
    assert torch.equal(with_labels, outputs.get(which)(logits, {**batch, "input_ids": other}))
    assert not torch.allclose(with_labels, outputs.get(which)(logits, batch))


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("which", TOKEN_OUTPUTS)
def test_a_sequence_without_a_next_token_is_an_error(which):
    logits, batch = language_case()
    batch["attention_mask"][4] = torch.tensor([0, 0, 0, 0, 1])
    with pytest.raises(DataError, match=r"\[4\]"):
        outputs.get(which)(logits, batch)
    with pytest.raises(DataError, match="no real next token"):
        outputs.get(which)(logits[:, :1], {"input_ids": batch["input_ids"][:, :1]})


@pytest.mark.parametrize("which", TOKEN_OUTPUTS)
def test_token_outputs_refuse_a_classifier(which):
    with pytest.raises(CoarError, match=r"\[6, 4\].*classifiers"):
        outputs.get(which)(*classifier_case())


@pytest.mark.parametrize("which", TOKEN_OUTPUTS)
def test_token_outputs_need_tokens_of_the_right_shape(which):
    logits, batch = language_case()
    with pytest.raises(DataError, match="input_ids"):
        outputs.get(which)(logits, {"attention_mask": batch["attention_mask"]})
    with pytest.raises(DataError, match=r"\(6, 4\)"):
        outputs.get(which)(logits, {"input_ids": batch["input_ids"][:, :4]})


@pytest.mark.parametrize("which", TOKEN_OUTPUTS)
@pytest.mark.parametrize("token", [7, -1])
def test_tokens_outside_the_vocabulary_are_an_error(which, token):
    # Once: a token of 7 in a vocabulary of 7 gives torch's IndexError or RuntimeError instead of a DataError, and a
    # label of -1 (only -100 is ignored) silently counts as token 0.
    logits, batch = language_case()
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][0, 2] = token
    with pytest.raises(DataError, match=str(token)):
        outputs.get(which)(logits, batch)


@pytest.mark.parametrize("which", ["margin", "logit", "log_prob", "loss"])
def test_classifier_outputs_refuse_a_language_model(which):
    logits, batch = language_case()
    with pytest.raises(CoarError, match=r"\[6, 5, 7\].*token_margin"):
        outputs.get(which)(logits, {**batch, "labels": batch["input_ids"]})


@pytest.mark.parametrize("which", ["margin", "logit", "log_prob", "loss"])
@pytest.mark.parametrize(("labels", "message"), [([0, 3], "3 classes"), ([-1, 0], "-1"), ([0, -100], "-100")])
def test_labels_out_of_range(which, labels, message):
    with pytest.raises(DataError, match=message):
        outputs.get(which)(LOGITS, {"labels": torch.tensor(labels)})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [0.0, 3.0],
            r"one number an example \(float32: 0, 3\), and the model gives 4: if they are classes.*labels.long",
        ),
        ([0.0, 1.0], r"0 and 1 as fractions.*output='regression'; if they are classes.*labels.long"),
        ([0.5, 2.0], r"\(float32: 0.5, 2\), and the model gives 4: fractions name no class.*of shape \[2, 4\]"),
        ([0.0, float("nan")], r"\(float32: 0, nan\), and the model gives 4: fractions name no class"),
    ],
    ids=["whole", "yes and no", "half", "nan"],
)
def test_labels_of_fractions_say_what_they_are(labels, message):
    """Of a table with a gap pandas makes all labels fractions."""
    batch = {"inputs": torch.randn(2, 3), "labels": torch.tensor(labels)}
    with pytest.raises(CoarError, match=message):
        preflight.bound(torch.nn.Linear(3, 4), [batch])


@pytest.mark.parametrize("name", ["margin", "logit", "log_prob", "loss"])
def test_fractions_are_no_classes_of_an_output_that_is_asked_for(name):
    """They were cut off: 1.5 was taken for 1."""
    logits = torch.randn(2, 4)
    whole = outputs.get(name)(logits, {"labels": torch.tensor([1.0, 3.0])})
    assert torch.equal(whole, outputs.get(name)(logits, {"labels": torch.tensor([1, 3])}))
    for labels, said in (([1.5, 3.0], "float32: 1.5, 3"), ([float("nan"), 3.0], "float32: 3, nan")):
        with pytest.raises(DataError, match=rf"fractions \({said}\), which name no class; give whole numbers"):
            outputs.get(name)(logits, {"labels": torch.tensor(labels)})


@pytest.mark.parametrize("which", ["margin", "logit", "log_prob", "loss"])
def test_labels_missing_or_misshapen(which):
    with pytest.raises(DataError, match="pixel_values"):
        outputs.get(which)(LOGITS, {"pixel_values": torch.zeros(2, 1)})
    with pytest.raises(DataError, match=r"\(2, 1\)"):
        outputs.get(which)(LOGITS, {"labels": torch.zeros(2, 1, dtype=torch.long)})


def test_a_margin_needs_two_classes():
    with pytest.raises(CoarError, match="2 classes"):
        outputs.get("margin")(torch.zeros(2, 1), {"labels": torch.zeros(2, dtype=torch.long)})


def test_unknown_name_lists_what_there_is():
    with pytest.raises(CoarError, match=r"'margins' \(did you mean 'margin'\?\); there are .*token_margin"):
        outputs.get("margins")


# ------------------------------------------------------------------------------------------------------ one's own ones


def test_a_registration_in_five_lines(registering):

    @outputs.register("entropy", unit="nats")
    def entropy(logits, batch):
        """Entropy of the predicted distribution."""
        log_probabilities = logits.log_softmax(-1)
        return -(log_probabilities.exp() * log_probabilities).sum(-1)

    assert "entropy" in outputs.names()
    assert outputs.get("entropy").unit == "nats"
    value = outputs.get("entropy")(torch.zeros(2, 4), {})
    assert value.tolist() == pytest.approx([math.log(4)] * 2)


def test_a_name_of_the_package_is_taken(registering):
    own = outputs.get("margin")
    with pytest.raises(CoarError, match=r"output 'margin' is taken by hf_coar\.models\.outputs\.margin.*replace=True"):

        @outputs.register("margin", unit="logits")
        def margin(logits, batch):
            return logits[:, 0]

    assert outputs.get("margin") is own


def test_a_function_is_taken_as_it_is():
    def second_logit(logits, batch):
        return logits[:, 1]

    output = outputs.get(second_logit)
    assert "second_logit" in output.name
    assert output(LOGITS.double(), {}).tolist() == [3.0, -1.0]
    assert output(LOGITS.double(), {}).dtype == torch.float32
    assert outputs.get(output) is output


def test_a_function_of_the_wrong_shape_is_an_error():
    with pytest.raises(CoarError, match=r"whole.*\(2, 3\).*\(2,\)"):
        outputs.get(outputs.Output("whole", "logits", lambda logits, batch: logits))(LOGITS, {})


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_one_number_an_example_may_have_an_axis_of_its_own_or_none(shape):
    numbers, labels = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0, 1, 1])
    by_hand = {
        "regression": -((numbers - labels) ** 2),
        "score": numbers,
        "multi_label": torch.nn.functional.logsigmoid(numbers * (2 * labels - 1)),
    }
    for name, expected in by_hand.items():
        found = outputs.get(name).function(numbers.view(shape), {"labels": labels})
        assert found.tolist() == pytest.approx(expected.tolist())
    with pytest.raises(DataError, match="output='multi_label' takes it for the logit of yes"):
        outputs.get("margin").function(numbers.view(3, 1), {"labels": labels})
