"""Meshes over TPU slices that are not here."""

import pytest

from tests.aot import in_aot_environment

_SLICES = """
import os
os.environ.update({"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})
from jax.experimental import topologies
from dsv3_jax.parallel.mesh import ordered
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1", num_slices=2).devices
for shape in ((2, 1, 2, 2, 1), (1, 2, 1, 4, 1)):
    mesh = ordered(devices[::-1], shape)
    assert [d.slice_index for d in mesh.flat] == [0] * 4 + [1] * 4, mesh
"""


@pytest.mark.slow
def test_leading_axes_cross_tpu_slices():
    done = in_aot_environment("-c", _SLICES)
    assert done.returncode == 0, done.stderr[-3000:]
