"""The controllers of the loss weights, step by step."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from peft_zoo.tasks.watermark.controllers import DlwsController, TwoSidedController


def test_the_two_sided_controller_by_hand() -> None:
    """Weights by hand for a decay of 1/2; PSNR has priority if both targets are missed."""
    controller = TwoSidedController(30, 0.9, rate=0.5, limit=1.2, decay=0.5)
    assert controller.weights() == (0.5, 0.5)
    steps = [
        # psnr, bits -> averages -> u
        ((40, 0.5), (40, 0.5), 0.5),  # only the bit target is missed
        ((30, 0.7), (35, 0.6), 1.0),
        ((35, 0.9), (35, 0.75), 1.2),  # the limit
        ((35, 1.05), (35, 0.9), 1.2),  # both are met
        ((23, 0.5), (29, 0.7), 0.7),  # both are missed
        ((29, 1.1), (29, 0.9), 0.2),  # only the PSNR target is missed
        ((29, 0.9), (29, 0.9), -0.3),
        ((31, 0.9), (30, 0.9), -0.3),
    ]
    for (psnr, bits), averages, u in steps:
        controller.update(psnr, bits)
        assert (controller.psnr, controller.bit_accuracy) == pytest.approx(averages)
        assert controller.log_ratio == pytest.approx(u)
        lambda_i, lambda_w = controller.weights()
        assert lambda_i + lambda_w == pytest.approx(1) and math.log(lambda_w / lambda_i) == pytest.approx(u)


def test_algorithm_1_by_hand() -> None:
    controller = DlwsController(30, 0.9, gamma=0.3)
    assert controller.weights() == (1, 0)
    for _ in range(2):
        controller.update(25, 0.5)
    assert controller.weights() == pytest.approx((1, 1.2))  # the PSNR does not count before the bits
    for _ in range(4):
        controller.update(25, 0.95)
    assert controller.weights() == pytest.approx((2.2, 1.2)) and controller.bits_met == 4
    controller.update(31, 0.95)  # the bit target is met for the fifth time
    assert controller.bit_target == pytest.approx(0.98) and (controller.bits_met, controller.picture_met) == (0, 1)
    controller.update(31, 0.95)  # below the raised target
    assert controller.weights() == pytest.approx((2.2, 1.8)) and controller.picture_met == 1
    for _ in range(4):
        controller.update(31, 0.99)
    assert controller.psnr_target == 32.5 and controller.picture_met == 0
    controller.update(31, 0.99)
    assert controller.bit_target == 1.0  # not 1.06
    assert controller.weights() == pytest.approx((2.5, 1.8))


@pytest.mark.parametrize("build", [lambda: TwoSidedController(30, 0.9), DlwsController])
def test_controllers_resume_from_their_state(build: Any) -> None:
    facts = [(20 + 0.7 * step % 17, 0.6 + 0.05 * (step % 9)) for step in range(60)]
    whole, first, second = build(), build(), build()
    for fact in facts:
        whole.update(*fact)
    for fact in facts[:31]:
        first.update(*fact)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for fact in facts[31:]:
        second.update(*fact)
    assert second.state_dict() == whole.state_dict() and second.weights() == whole.weights()
    assert whole.state_dict() != build().state_dict()
    with pytest.raises(ValueError, match="more"):
        second.load_state_dict({**whole.state_dict(), "more": 1})
