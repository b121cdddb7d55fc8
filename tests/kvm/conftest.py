"""Tests that run guests on real KVM. Without a usable /dev/kvm they are skipped with the reason."""

import pytest

from pykvm import KvmUnavailableError, System
from tests.conftest import TIME_SCALE


def _why_not() -> str:
    try:
        System().close()
    except KvmUnavailableError as error:
        return str(error)
    return ""


def pytest_collection_modifyitems(items):
    why = _why_not()
    if why:
        for item in items:
            if "tests/kvm" in str(item.fspath):
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture
def system():
    with System() as opened:
        yield opened


@pytest.fixture
def patient_source(monkeypatch):
    """For migrations: a destination in an emulated host takes its time."""
    from pykvm.state import migrate

    monkeypatch.setattr(migrate, "STANDING", migrate.STANDING * TIME_SCALE)


@pytest.fixture
def machine(patient_source):
    """A machine to migrate: its guest waits half way, and writes memory all the time."""
    from tests.kvm.moving import half_way

    with half_way() as machine:
        yield machine


@pytest.fixture(params=["python", "native"])
def loop(request):
    """Both run loops."""
    return request.param
