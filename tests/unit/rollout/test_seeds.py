"""The seeds of the workers' engines."""

from palimpsest.services.rollout.seeds import engine_seed


def test_each_worker_has_a_distinct_and_stable_seed() -> None:
    seeds = {(run, i): engine_seed(run, f"worker-{i}") for run in range(50) for i in range(50)}
    assert len(set(seeds.values())) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds.values()), "vLLM takes 32 bits, some generators 31"
    assert seeds == {(run, i): engine_seed(run, f"worker-{i}") for run, i in seeds}
    assert engine_seed(0, "worker-0") == 2031640346, "a resumed run keeps its seeds"
