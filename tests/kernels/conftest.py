from collections.abc import Iterator

import pytest

from slipstream.kernels.native import library
from slipstream.kernels.triton import launch

if launch.runs_on("cpu"):
    import bf16_interpreter  # noqa: F401  (mends the interpreter, for tests that go through all backends)


@pytest.fixture(params=[name for name, runs in library.variants().items() if runs] or ["none"], scope="module")
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test with each compiled variant that this processor can run."""
    native = library.load()
    if native is None:
        pytest.skip("no compiled kernels here")
    before = native.slip_isa()
    library.select(request.param)
    native.slip_set_threads(2)
    yield request.param
    native.slip_select(before)
