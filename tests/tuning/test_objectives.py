import sys
from pathlib import Path

import pytest
import torch

from gristmill.curation.folder import HouseError
from gristmill.tuning.losses import LOSSES
from gristmill.tuning.objectives import OBJECTIVES, Scored, family_of, find_loss, unit_losses

OWN = """
import torch
def squared(chosen, rejected, *, gap: float = 1.0): return (chosen - rejected - gap) ** 2
def summed(chosen, rejected): return (chosen - rejected).sum()
def strange(chosen, rejected, colour): return chosen
def broken(chosen, rejected): raise ZeroDivisionError("of course")
def demanding(chosen, rejected, *, gap): return chosen * gap
def nothing(x): return x
number = 3
def deaf(chosen, rejected): return (rejected - chosen).detach()
def greedy(chosen, rejected): return rejected - chosen.mul_(2)
def late(chosen, rejected):
    if len(chosen) > 2:
        raise KeyError("gone")
    return rejected - chosen
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_own_losses.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_own_losses", None)


def test_every_loss_is_found_by_the_objective_of_its_family() -> None:
    for name, function in LOSSES.items():
        (objective,) = [key for key, families in OBJECTIVES.items() if family_of(function) in families]
        loss = find_loss(name, objective)
        assert loss.name == name and loss.function is function
        for other in set(OBJECTIVES) - {objective}:
            with pytest.raises(HouseError, match=rf"loss {name} is one of .*use {objective}"):
                find_loss(name, other)
    assert [find_loss(None, objective).name for objective in OBJECTIVES] == ["nll", "dpo", "kto"]


def test_a_reference_is_asked_for_by_name() -> None:
    wanting = {name for name in ("dpo", "simpo", "orpo", "ipo", "tpo") if find_loss(name, "dpo").reference}
    assert wanting == {"dpo", "ipo", "tpo"}
    assert not find_loss("nll", "sft").reference and "kl" in find_loss("kto", "kto").tensors


def test_options_come_with_the_name() -> None:
    assert find_loss({"ipo": {"beta": 0.2}}, "dpo").options == {"beta": 0.2}
    whole = find_loss({"dpo": {"beta": 1}}, "dpo")
    assert whole.options == {"beta": 1.0, "label_smoothing": 0.0} and type(whole.options["beta"]) is float
    assert whole.beta == 1.0 and find_loss("nll", "sft").beta == 1.0


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("dpoo", r"unknown loss 'dpoo'; did you mean 'dpo'\? known for dpo: apo_down, .*tpo"),
        (
            {"dpo": {"betta": 0.1}},
            r"loss dpo has no option 'betta'; did you mean 'beta'\? it has beta, label_smoothing",
        ),
        ({"dpo": {"beta": True}}, "loss dpo: beta is of type float, not True"),
        ({"dpo": {"beta": "much"}}, "loss dpo: beta is of type float, not 'much'"),
        ({"dpo": {"beta": 0.0}}, "loss dpo: beta is 0.0: it must be above 0"),
        ({"dpo": {}, "ipo": {}}, "one name with its options"),
        ("no_such_package.loss", "loss no_such_package.loss: cannot import no_such_package"),
        ("my_own_losses.absent", "my_own_losses has no function absent"),
        ("my_own_losses.number", "my_own_losses has no function number"),
        ("my_own_losses.nothing", r"none of its parameters says what it is a loss of: rejected \(pairs\)"),
        ("my_own_losses.strange", "asks for 'colour'; a loss of pairs gets chosen, rejected"),
        ("my_own_losses.summed", r"^loss my_own_losses.summed returned \(\); a loss of pairs returns a tensor \(2,\)"),
        ("my_own_losses.broken", "fails on 2 pairs: ZeroDivisionError: of course .*, line"),
        ("my_own_losses.deaf", "loss my_own_losses.deaf: no gradient flows from what it returns to chosen or rejected"),
        ("my_own_losses.greedy", "fails on two pairs: RuntimeError: .*modified by an inplace operation"),
        ("my_own_losses.demanding", "needs its option 'gap'"),
        ({"my_own_losses.squared": {"gab": 1.0}}, r"has no option 'gab'; did you mean 'gap'"),
    ],
)
def test_what_cannot_be_a_loss_is_named(own, wanted, message: str) -> None:
    with pytest.raises(HouseError, match=message):
        find_loss(wanted, "dpo")


def test_a_loss_of_ones_own_that_raises_later_is_told_with_its_line(own) -> None:
    loss = find_loss("my_own_losses.late", "dpo")
    with pytest.raises(
        HouseError, match=r"my_own_losses.late fails on 3 pairs: KeyError: 'gone' \(.*my_own_losses.py, line"
    ):
        unit_losses(loss, scored([2, 2, 2]))


def scored(widths, **known):
    """Answers of two tokens each, of weights 1 and 2."""
    answers = sum(widths)
    logps = -torch.rand(2 * answers, generator=torch.Generator().manual_seed(answers))
    first = torch.tensor([0, *torch.tensor(widths).cumsum(0).tolist()])
    return Scored(
        logps, torch.tensor([1.0, 2.0]).repeat(answers), torch.arange(answers).repeat_interleave(2), first, **known
    )


def test_a_loss_of_ones_own_trains_like_any_other(own) -> None:
    loss = find_loss({"my_own_losses.squared": {"gap": 2}}, "dpo")
    assert not loss.reference and loss.family == "pairs"
    given = scored([2, 2, 2])
    sums = (given.logps * given.weights).view(-1, 2).sum(1).view(-1, 2)
    losses, margins = unit_losses(loss, given)
    torch.testing.assert_close(losses, (sums[:, 0] - sums[:, 1] - 2) ** 2)
    torch.testing.assert_close(margins, sums[:, 0] - sums[:, 1])


def test_each_family_gets_what_its_parameters_name() -> None:
    reference = -torch.arange(6.0)
    pairs = scored([2, 2, 2], reference=reference)
    sums = (pairs.logps * pairs.weights).view(-1, 2).sum(1)
    losses, margins = unit_losses(find_loss({"dpo": {"beta": 0.5}}, "dpo"), pairs)
    gains = 0.5 * (sums - reference)
    torch.testing.assert_close(margins, gains[::2] - gains[1::2])
    torch.testing.assert_close(losses, torch.log1p(torch.exp(-margins)))
    _, margins = unit_losses(find_loss({"simpo": {"beta": 2.0}}, "dpo"), scored([2, 2, 2]))
    torch.testing.assert_close(margins, 2.0 * (sums[::2] - sums[1::2]) / 3)  # means over the answers' weight

    labels = torch.tensor([True, False, True, True, False, True])
    single = scored([1] * 6, reference=reference, desirable=labels, kl=torch.tensor(0.3))
    losses, rewards = unit_losses(find_loss({"kto": {"beta": 0.5}}, "kto"), single)
    torch.testing.assert_close(rewards, gains)
    signs = torch.where(labels, 1.0, -1.0)
    torch.testing.assert_close(losses, torch.sigmoid(-signs * (gains - 0.5 * 0.3)))

    rewards = torch.tensor([0.0, 2.0, 1.0, 5.0, 4.0, 6.0])
    lists = scored([3, 1, 2], reference=reference, rewards=rewards)
    losses, margins = unit_losses(find_loss({"plackett_luce": {"beta": 0.5}}, "dpo"), lists)
    torch.testing.assert_close(margins, torch.stack([gains[1] - gains[0], gains[3] - gains[3], gains[5] - gains[4]]))
    torch.testing.assert_close(losses[2], torch.log1p(torch.exp(gains[4] - gains[5])))
    assert losses[1] == 0

    tokens = scored([1, 1, 1], balance=torch.tensor([2.0, 0.5, 1.0]))
    entries = -(tokens.logps * tokens.weights).view(-1, 2).sum(1)
    losses, _ = unit_losses(find_loss("mft", "sft"), tokens)
    torch.testing.assert_close(losses, entries * torch.tensor([2.0, 0.5, 1.0]))
