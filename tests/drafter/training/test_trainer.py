import copy
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from slipstream.drafter.training.checkpoint import Checkpoint
from slipstream.drafter.training.gate import score
from slipstream.drafter.training.losses import NAMES, LossName
from slipstream.drafter.training.network import TrainableHead
from slipstream.drafter.training.packing import Example, pack
from slipstream.drafter.training.trainer import Trainer, TrainOptions
from slipstream.engine.models.config import DecoderConfig

MakeHead, MakeExample = Callable[..., TrainableHead], Callable[..., Example]


def draftable(example: Example) -> Example:
    """Only tokens of the draft vocabulary of the test's heads."""
    example.tokens[:] = example.tokens // 2 * 2
    return example


def test_training_makes_a_head_better(make_head: MakeHead, make_example: MakeExample) -> None:
    example = draftable(make_example(80))
    trainer = Trainer(make_head(), TrainOptions(steps=2, learning_rate=5e-3, warmup=5))
    before = score(trainer.head, [example], 2).accept_length(2)
    first = trainer.learn([[example]])
    for _ in range(60):
        last = trainer.learn([[example]])
    assert last.loss < first.loss / 2 and last.step == 61 and last.tokens == first.tokens
    assert score(trainer.head, [example], 2).accept_length(2) > before + 0.5


def test_what_follows_a_wrong_draft_token_is_not_learned(make_head: MakeHead, make_example: MakeExample) -> None:
    """Where no first draft token is right, learning chains of three does what learning one draft token does."""
    text = draftable(make_example(40))
    drafted = make_head()
    with torch.no_grad():
        drafts = drafted.to_target[drafted.logits(drafted.draft(pack([text], 1)).hidden).argmax(-1)].tolist()
    at = text.start + text.num_context + 2
    wrong = [place for place, draft in enumerate(drafts) if text.tokens[at + place] != draft]
    assert 0 < len(wrong) < len(drafts)
    for place in range(len(drafts)):
        if place not in wrong:  # another token of the draft vocabulary
            text.tokens[at + place] = (drafts[place] + 2) % 96
    chains, single = (Trainer(make_head(), TrainOptions(steps=steps)) for steps in (3, 1))
    right = chains.learn([[text]]).right
    single.learn([[text]])
    assert right == (0, 0, 0)
    for name in chains.head.trained:
        torch.testing.assert_close(chains.head.weights[name], single.head.weights[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_trains(name: LossName, make_head: MakeHead, make_example: MakeExample) -> None:
    example = draftable(make_example(50))
    answer = example.tokens[example.num_prompt :, None]
    likely = (answer, torch.full(answer.shape, 0.9).log().numpy())
    example = Example(example.tokens, example.num_prompt, 0, example.features, likely)
    trainer = Trainer(make_head(), TrainOptions(loss=name, steps=2, learning_rate=5e-3, warmup=5))
    right = [trainer.learn([[example]]).right[0] for _ in range(40)]
    assert right[-1] > right[0] + 0.2


def test_parts_add_up_to_one_step(make_head: MakeHead, make_example: MakeExample) -> None:
    texts = [make_example(30, seed=1), make_example(45, seed=2)]
    whole, parts = (Trainer(make_head(), TrainOptions()) for _ in range(2))
    whole.learn([texts])
    parts.learn([[texts[0]], [texts[1]]])
    for name in whole.head.trained:
        torch.testing.assert_close(whole.head.weights[name], parts.head.weights[name], rtol=1e-3, atol=1e-5)


def test_a_head_that_has_learned_nothing_begins_with_long_steps(make_head: MakeHead, make_example: MakeExample) -> None:
    text, options = make_example(40), TrainOptions(warmup=1, fall=4)
    cold, warm = (Trainer(make_head(), options, is_cold=is_cold) for is_cold in (True, False))
    name = "fc.weight"

    def moves(trainer: Trainer, steps: int) -> float:
        for _ in range(steps):
            before = trainer.head.weights[name].detach().clone()
            trainer.learn([[text]])
        return float((trainer.head.weights[name].detach() - before).norm())

    ratio = options.first_rate / options.learning_rate
    assert moves(cold, 1) / moves(warm, 1) == pytest.approx(ratio, rel=0.05)
    assert moves(cold, 12) / moves(warm, 12) == pytest.approx(ratio / 2, rel=0.3)
    assert moves(cold, 120) / moves(warm, 120) == pytest.approx(1, rel=0.3)


def test_resumed_training_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path, make_head: MakeHead, make_example: MakeExample
) -> None:
    texts = [make_example(40, seed=seed) for seed in range(6)]
    through = Trainer(make_head(), TrainOptions(), is_cold=True)
    for text in texts[:3]:
        through.learn([[text]])
    checkpoint = Checkpoint(tmp_path, "shared")
    checkpoint.save(through.state())
    for text in texts[3:]:
        through.learn([[text]])  # while the checkpoint is being written
    checkpoint.finish()
    # A head read from a file has its tensors in another order than one that was just made.
    resumed = Trainer(make_head(seed=5, backwards=True), TrainOptions())
    for name in ("lm_head.weight",):  # frozen: not part of the checkpoint
        resumed.head.weights[name].copy_(through.head.weights[name])
    state = Checkpoint(tmp_path, "shared").load()
    assert state is not None and "lm_head.weight" not in state["weights"]
    resumed.resume(state)
    for text in texts[3:]:
        resumed.learn([[text]])
    for name, tensor in through.published().items():
        assert torch.equal(tensor, resumed.published()[name]), name


def test_a_damaged_checkpoint_is_no_checkpoint(tmp_path: Path, make_head: MakeHead) -> None:
    checkpoint = Checkpoint(tmp_path, "shared")
    assert checkpoint.load() is None
    checkpoint.save(Trainer(make_head(), TrainOptions()).state(), wait=True)
    data = (tmp_path / "shared.pt").read_bytes()
    (tmp_path / "shared.pt").write_bytes(data[: len(data) // 2])
    assert checkpoint.load() is None


def test_any_damage_to_a_checkpoint(tmp_path: Path) -> None:
    """torch raises what it likes, IndexError and KeyError among it."""
    path = tmp_path / "shared.pt"
    checkpoint = Checkpoint(tmp_path, "shared")
    checkpoint.save({"trainer": {"step": 3, "w": torch.ones(4, 4)}, "target": "x", "credit": 1.5}, wait=True)
    data = path.read_bytes()
    pickled = data.index(b"\x80\x02")
    for value in (0x30, 0x31, 0x61, 0x65, 0x73, 0x75, 0x85, 0x87):  # instructions that take from an empty stack, say
        path.write_bytes(data[: pickled + 2] + bytes([value]) + data[pickled + 3 :])
        assert checkpoint.load() is None
    choose = random.Random(0)
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(3):
            damaged[choose.randrange(len(damaged))] = choose.randrange(256)
        path.write_bytes(damaged)
        found = checkpoint.load()
        assert found is None or isinstance(found, dict)
    path.unlink()
    path.mkdir()
    assert checkpoint.load() is None
    checkpoint.save({"trainer": 1}, wait=True)
    assert isinstance(checkpoint.error, OSError) and [each.name for each in tmp_path.iterdir()] == ["shared.pt"]


def test_frozen_weights_stay(make_head: MakeHead, make_example: MakeExample) -> None:
    trainer = Trainer(make_head(), TrainOptions())
    before = trainer.head.weights["lm_head.weight"].clone()
    trainer.learn([[make_example()]])
    assert torch.equal(trainer.head.weights["lm_head.weight"], before)
    assert torch.equal(trainer.published()["lm_head.weight"], before)


def test_training_resumes_whatever_order_the_tensors_come_in(
    make_head: MakeHead, make_example: MakeExample, target: DecoderConfig
) -> None:
    """A cold head and a published one list them differently; momentum must find its own."""
    text = make_example(40)
    through = Trainer(make_head(), TrainOptions())
    through.learn([[text]])
    head = through.head
    turned = dict(reversed(head.tensors().items()))
    resumed = Trainer(TrainableHead(head.config, target, head._embedding, turned, torch.float32), TrainOptions())
    resumed.resume(copy.deepcopy(through.state()))
    for trainer in (through, resumed):
        trainer.learn([[text]])
    for name, tensor in through.published().items():
        assert torch.equal(tensor, resumed.published()[name]), name


def test_a_text_with_damaged_features_spoils_nothing(make_head: MakeHead, make_example: MakeExample) -> None:
    trainer = Trainer(make_head(), TrainOptions(averaging=0.5))
    trainer.learn([[make_example(30, seed=1)]])
    before, state = trainer.published(), copy.deepcopy(trainer.state()["optimizers"])
    damaged = make_example(40, seed=2)
    damaged.features[3, 1, 5] = float("inf")
    assert trainer.learn([[make_example(30, seed=3)], [damaged]]).tokens > 40
    for name, tensor in trainer.published().items():
        assert torch.equal(tensor, before[name])
    assert str(trainer.state()["optimizers"]) == str(state)
    trainer.learn([[make_example(30, seed=1)]])
    assert all(tensor.isfinite().all() for tensor in trainer.published().values())
    assert not torch.equal(trainer.published()["fc.weight"], before["fc.weight"])
