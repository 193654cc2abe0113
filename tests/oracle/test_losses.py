"""Both losses against their definitions written out in plain Python, and their memory."""

import math

import pytest
import torch
from reweighting import steps_of
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import InternVLConfig, InternVLForConditionalGeneration

from dreamprm_dist.hypergradient.jvp import jvp
from dreamprm_dist.losses import MetaLossConfig, instance_losses, meta_losses, step_scores
from dreamprm_dist.prm.aggregation import AGGREGATIONS
from dreamprm_dist.prm.batch import Batch
from dreamprm_dist.prm.chat import IGNORE_INDEX
from dreamprm_dist.prm.model import PRM

LABELS = {"+": 1, "-": 3}
LOGITS = torch.tensor(
    [[0.1, 2.0, -1.0, 0.5], [1.0, 0.0, 0.3, 2.0], [0.0, 1.0, 0.0, -1.0]], dtype=torch.float64
)
STEP_ROWS = torch.tensor([0, 0, 1])


def probability(step: int, token: int) -> float:
    row = LOGITS[step].tolist()
    return math.exp(row[token]) / sum(math.exp(x) for x in row)


def test_instance_loss_is_the_mean_over_labelled_steps():
    targets = torch.tensor([1, IGNORE_INDEX, 3])
    found = instance_losses(LOGITS, steps_of(targets, STEP_ROWS, 3))
    expected = [-math.log(probability(0, 1)), -math.log(probability(2, 3)), 0.0]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    both = instance_losses(LOGITS, steps_of(torch.tensor([1, 3, 3]), STEP_ROWS, 2))
    mean = -(math.log(probability(0, 1)) + math.log(probability(1, 3))) / 2
    assert both[0].item() == pytest.approx(mean, rel=1e-12)


def test_step_scores_are_over_the_whole_vocabulary_or_the_pair():
    expected = torch.tensor([probability(step, 1) for step in range(3)], dtype=torch.float64)
    torch.testing.assert_close(step_scores(LOGITS, LABELS), expected)
    minus = torch.tensor([probability(step, 3) for step in range(3)], dtype=torch.float64)
    for label, of_label in (("+", expected), ("-", minus)):
        pair = step_scores(LOGITS, LABELS, label, "pair")
        torch.testing.assert_close(pair, of_label / (expected + minus))


def test_losses_and_scores_of_bf16_logits_are_taken_in_float32():
    logits = LOGITS.bfloat16()
    batch = steps_of(torch.tensor([1, 3, 1]), STEP_ROWS, 2)
    losses = instance_losses(logits, batch)
    assert losses.dtype == torch.float32
    assert losses.equal(instance_losses(logits.float(), batch))
    for over in ("vocabulary", "pair"):
        scores = step_scores(logits, LABELS, "-", over)
        assert scores.equal(step_scores(logits.float(), LABELS, "-", over))


@pytest.mark.parametrize("right", [(1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("error, power", [("squared", 2), ("absolute", 1)])
def test_meta_loss_targets(right, error, power):
    true_false = torch.tensor(right, dtype=torch.float64)
    steps = ([0, 1], [2])
    plus = [sum(probability(i, 1) for i in own) / len(own) for own in steps]
    signed = [
        sum(probability(i, 1 if y else 3) for i in own) / len(own)
        for own, y in zip(steps, right, strict=True)
    ]
    arguments = (LOGITS, STEP_ROWS, true_false, LABELS)
    expected = [abs(s - y) ** power for s, y in zip(plus, right, strict=True)]
    found = meta_losses(*arguments, MetaLossConfig(loss_target="+", meta_error=error))
    torch.testing.assert_close(found.tolist(), expected)
    expected = [(1 - s) ** power for s in signed]
    found = meta_losses(*arguments, MetaLossConfig(meta_error=error))
    torch.testing.assert_close(found.tolist(), expected)


CANCELS = [("+", over, name) for over in ("vocabulary", "pair") for name in AGGREGATIONS]
CANCELS += [("both", "pair", name) for name in ("mean", "last")]


@pytest.mark.parametrize("loss_target, score_over, aggregation", CANCELS)
def test_answers_at_random_pull_no_score_under_the_absolute_error(
    loss_target, score_over, aggregation
):
    def pull(error: str) -> torch.Tensor:
        """Gradient of the meta loss of both answers, each half of the time."""
        config = MetaLossConfig(aggregation, loss_target, error, score_over)
        logits = LOGITS.clone().requires_grad_()
        loss = sum(
            meta_losses(
                *(logits, STEP_ROWS, torch.full((2,), y, dtype=torch.float64), LABELS, config)
            ).sum()
            for y in (0.0, 1.0)
        )
        return torch.autograd.grad(loss, logits)[0]

    assert pull("absolute").abs().max() < 1e-15
    assert pull("squared").abs().max() > 1e-2


class LargestOutput(TorchDispatchMode):
    """Remembers the largest tensor that has a vocabulary dimension and is no parameter's shape."""

    def __init__(self, vocabulary: int, hidden: int):
        super().__init__()
        self.vocabulary, self.hidden, self.rows = vocabulary, hidden, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple | list) else [result]
        for output in outputs:
            if isinstance(output, torch.Tensor) and self.vocabulary in output.shape:
                rows = output.numel() // self.vocabulary
                if rows != self.hidden:  # the embedding and head weights themselves
                    self.rows = max(self.rows, rows)
        return result


def test_no_tensor_of_sequence_by_vocabulary_is_ever_made():
    vocabulary, hidden, length, steps = 151_674, 16, 400, 3
    config = InternVLConfig(
        vision_config={
            "image_size": 28,
            "patch_size": 14,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        image_seq_length=1,
    )
    prm = PRM(InternVLForConditionalGeneration(config)).train()
    ids = torch.randint(0, 1000, (2, length))
    ids[:, 5] = config.image_token_id
    batch = Batch(
        input_ids=ids,
        pixel_values=torch.randn(2, 3, 28, 28),
        shown_tiles=torch.arange(2),
        step_rows=torch.tensor([0, 0, 1]),
        step_positions=torch.tensor([100, 399, 300]),
        step_targets=torch.tensor([10, 12, 10]),
        step_counts=torch.zeros(3, 2, dtype=torch.long),
        sample_ids=torch.arange(2),
        true_false=torch.ones(2),
    )
    parameters = dict(prm.named_parameters())

    def losses(parameters):
        logits = functional_call(prm, dict(parameters), (batch,)).logits
        return instance_losses(logits, batch)

    with LargestOutput(vocabulary, hidden) as seen:
        losses(parameters).mean().backward()
        meta_losses(
            *(prm(batch).logits, batch.step_rows, batch.true_false),
            *({"+": 10, "-": 12}, MetaLossConfig()),
        ).mean().backward()
        with prm.forward_mode():
            jvp(losses, parameters, {n: torch.ones_like(p) for n, p in parameters.items()})
    assert seen.rows == steps

    with LargestOutput(vocabulary, hidden) as seen, torch.no_grad():
        prm.model(input_ids=ids, pixel_values=batch.pixel_values)
    assert seen.rows >= length  # what the plain model does: the check can fail
