"""Where DeepSpeed computes."""

from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator


def test_deepspeed_computes_on_the_runs_device_and_not_on_that_of_the_local_rank(
    make_run, monkeypatch
):
    """Of which rank 1 has another: on a machine where each sees a GPU of its own, all have 0."""
    taken: list[int] = []
    monkeypatch.setattr(CPU_Accelerator, "set_device", lambda self, index: taken.append(index))
    make_run()
    assert taken == [0]
