"""Whatever call is allowed, its result is right: see properties.py."""

from conftest import KERNEL_DEVICE
from hypothesis import HealthCheck, given, settings
from properties import cases, check


@settings(max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(KERNEL_DEVICE))
def test_every_call_that_is_allowed_is_as_exact_as_timms(case):
    check(case)
