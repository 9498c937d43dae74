"""The calibrated router's classifier against plain refits without each text."""

import pytest
import torch

from tests.reference import discriminant as reference
from upscale.calibrating.discriminant import MISSED, SHARE, SHARPNESS, SHRINKAGE, fit


def samples(seed, features, texts, apart=1.5):
    """Random samples: ``texts`` holds, by class, the number of samples of each of its texts; classes overlap."""
    generator = torch.Generator().manual_seed(seed)
    x, classes, groups = [], [], []
    scales = torch.rand(features, generator=generator) + 0.2
    for c, of_class in enumerate(texts):
        centre = apart * torch.randn(features, generator=generator)
        for size in of_class:
            text = centre + torch.randn(features, generator=generator)
            x += [scales * (text + 0.3 * torch.randn(features, generator=generator)) for _ in range(size)]
            classes += [c] * size
            groups += [1 + max(groups, default=0)] * size
    return torch.stack(x), classes, groups


TEXTS = {
    "one sample a text": [[1] * 4, [1] * 7, [1] * 3],
    "texts of many samples": [[3, 1, 5], [2, 2], [1, 8, 2, 2]],
    "two classes": [[1, 2], [1, 1]],
}


@pytest.mark.parametrize("features", [3, 40], ids=["few features", "more features than samples"])
@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("fallback", [None, "last"])
@pytest.mark.parametrize("apart", [0.4, 3.0])
def test_the_fit_is_that_of_plain_refits(features, texts, fallback, apart):
    x, classes, groups = samples(7, features, texts, apart)
    last = None if fallback is None else len(texts) - 1
    found = fit(x, torch.tensor(classes), torch.tensor(groups), fallback=last)
    rows = list(x.double())
    loss, shrinkage, left_out, score = reference.fit(rows, classes, groups, last, SHRINKAGE, SHARPNESS, MISSED, SHARE)
    assert found.shrinkage == shrinkage
    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert (found.weight.dtype, found.bias.dtype, found.left_out.dtype) == (torch.float32,) * 3
    assert_same_odds(found.left_out, left_out)
    new = samples(8, features, texts)[0]
    assert_same_odds(new @ found.weight.T + found.bias, [score(row) for row in new.double()])


def assert_same_odds(got, want):
    got, want = got.double().log_softmax(dim=-1), torch.tensor(want).double().log_softmax(dim=-1)
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


def test_the_reference_itself_knows_two_gaussians():
    """In one dimension, by hand: means 0 and 4, variance 1, so that log-odds are 4x - 8."""
    x = [torch.tensor([v]).double() for v in (-1.0, 1.0, 3.0, 5.0)]
    score = reference.discriminant(x, [0, 0, 1, 1], [0, 1, 2, 3], 0.5)  # shrinking a number towards itself
    for value in (-3.0, 2.0, 7.0):
        a, b = score(torch.tensor([value]).double())
        assert b - a == pytest.approx(4 * value - 8)


def test_the_number_of_samples_and_texts_of_a_class_does_not_matter():
    """Every text of the first class with its sample twice: the classifier stays."""
    x, classes, groups = samples(1, 5, [[1] * 3, [1] * 4])
    one = fit(x, torch.tensor(classes), torch.tensor(groups))
    twice = torch.cat([x, x[:3]])
    two = fit(twice, torch.tensor(classes + classes[:3]), torch.tensor(groups + groups[:3]))
    assert two.shrinkage == one.shrinkage
    torch.testing.assert_close(two.weight - two.weight[0], one.weight - one.weight[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(two.bias - two.bias[0], one.bias - one.bias[0], atol=1e-4, rtol=1e-4)


def test_the_fallback_keeps_its_own_and_leaves_the_rest_of_the_space():
    """Many texts of the fallback, few of the others: without the shift, what lies between is cut in the middle."""
    x, classes, groups = samples(3, 8, [[1] * 4, [1] * 4, [1] * 60], apart=2.5)
    labels = torch.tensor(classes)
    found = fit(x, labels, torch.tensor(groups), fallback=2)
    own = found.left_out[labels == 2].argmax(dim=1) == 2
    assert 1 - 2 * MISSED <= float(own.float().mean()) <= 1
    plain = fit(x, labels, torch.tensor(groups))
    margin = [f.left_out[:, 2] - f.left_out[:, :2].amax(dim=1) for f in (found, plain)]
    assert (margin[0][labels != 2] < 0).all()
    nearest, border = margin[0][labels != 2].max(), margin[0][labels == 2].quantile(MISSED)
    assert float(border) == pytest.approx(-SHARE * float(nearest - border), rel=1e-4)  # the border is at 0


def test_the_same_samples_give_the_same_bits_whatever_their_format():
    x, classes, groups = samples(2, 12, TEXTS["texts of many samples"])
    torch.manual_seed(1)
    one = fit(x, torch.tensor(classes), torch.tensor(groups), fallback=2)
    torch.manual_seed(2)
    two = fit(x.double(), torch.tensor(classes), torch.tensor(groups), fallback=2)
    for a, b in ((one.weight, two.weight), (one.bias, two.bias), (one.left_out, two.left_out)):
        assert torch.equal(a, b)
    half = fit(x.bfloat16(), torch.tensor(classes), torch.tensor(groups), fallback=2)
    same = fit(x.bfloat16().float(), torch.tensor(classes), torch.tensor(groups), fallback=2)
    assert torch.equal(half.weight, same.weight)


@pytest.mark.parametrize("classes", [[0, 0, 0, 1], [0, 0, 0, 2], [0, 1, 1, 1]])
def test_a_class_of_one_text_cannot_be_left_out(classes):
    x = samples(0, 3, [[1] * 4])[0]
    groups = torch.arange(4) if classes[0] == classes[1] else torch.tensor([0, 1, 1, 1])
    with pytest.raises(ValueError, match=r"class [012] needs samples of at least two groups"):
        fit(x, torch.tensor(classes), groups)
