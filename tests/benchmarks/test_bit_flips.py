from benchmarks.bit_flips import measure


def test_no_bit_of_a_checkpoint_or_shard_changes_unseen() -> None:
    figures = measure(flips=60, seed=2)
    assert figures["noticed"] == figures["flips"] == 60
    assert figures["false alarms"] == 0
