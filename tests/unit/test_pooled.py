"""Several seeds pooled: means over all questions, intervals over seeds and images."""

import numpy as np
import pytest

from dreamprm_dist.evaluation.best_of_n import bootstrap_intervals
from dreamprm_dist.evaluation.pooled import nested_bootstrap, pooled
from dreamprm_dist.evaluation.results import PrmOutcome, QuestionOutcome, Results


def evaluation(correct: dict[str, list[bool]], images: list[str]) -> Results:
    questions = [
        QuestionOutcome(id=str(i), images=[image], subject="", first=i % 2 == 0, random=0.5,
                        self_consistency=False, oracle=True)
        for i, image in enumerate(images)
    ]  # fmt: skip
    prms = {
        label: PrmOutcome(aggregation="last", correct={"last": c, "mean": [False] * len(c)},
                          steps=None)
        for label, c in correct.items()
    }  # fmt: skip
    return Results(
        num_questions=len(images), num_candidates=0, num_unparsed=0, table=[], between=[],
        by_subject={}, by_n={}, questions=questions, prms=prms,
    )  # fmt: skip


def test_questions_of_all_seeds_count_alike_and_pairs_are_paired():
    one = evaluation({"a": [True] * 4, "b": [True, False] * 2}, list("wxyz"))
    two = evaluation({"a": [False, True], "b": [True, True]}, list("wx"))
    found = pooled([one, two], [("a", "b")])
    assert found["num_questions"] == 6
    assert found["accuracy"] == pytest.approx(
        {"first": 0.5, "random": 0.5, "self_consistency": 0, "oracle": 1, "a": 5 / 6, "b": 4 / 6}
    )
    assert found["differences"]["a_minus_b"]["mean"] == pytest.approx(1 / 6)
    assert found["intervals"]["oracle"] == [1, 1]
    low, high = found["intervals"]["a"]
    assert low < 5 / 6 < high == 1


def test_one_run_is_the_bootstrap_over_its_clusters():
    values = np.random.default_rng(1).random((60, 2))
    clusters = [i // 3 for i in range(60)]
    nested = nested_bootstrap([(values, clusters)])
    # Two samples of 10,000: an edge of the interval is known to some percent of its width.
    np.testing.assert_allclose(nested, bootstrap_intervals(values, clusters), atol=0.004)


def test_the_variance_is_that_of_seeds_and_of_images_within_them():
    """Against the closed form of the two-stage bootstrap for runs of equal size."""
    generator = np.random.default_rng(2)
    means = np.array([0.2, 0.5, 0.9, 0.4])
    runs = [((mean + generator.normal(0, 0.6, 200))[:, None], range(200)) for mean in means]
    (low, high), = nested_bootstrap(runs)  # fmt: skip
    found = [values.mean() for values, _ in runs]
    within = np.mean([values.var() / 200 for values, _ in runs])
    deviation = np.sqrt((np.var(found) + within) / 4)
    # Four means: not quite normal, and so some percent.
    assert (high - low) / 2 == pytest.approx(1.96 * deviation, rel=0.06)
    assert (high - low) / 2 > 1.5 * 1.96 * np.sqrt(within / 4)  # far wider than images alone
    assert (low + high) / 2 == pytest.approx(np.mean(found), abs=0.02)


def test_images_and_not_questions_are_resampled():
    values = np.repeat(np.random.default_rng(3).random(50), 4)[:, None]
    images = [str(i // 4) for i in range(200)]
    (low, high), = nested_bootstrap([(values, images)], 2000)  # fmt: skip
    (alone_low, alone_high), = nested_bootstrap([(values, range(200))], 2000)  # fmt: skip
    assert high - low > 1.7 * (alone_high - alone_low)  # twice: four equal questions are one
