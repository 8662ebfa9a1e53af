# SPDX-License-Identifier: Apache-2.0
"""Vocabulary-parallel ops on two ranks, gloo or NCCL, equal the unsharded result (cases 70, 71).

Targets on either rank, uneven shards, a shard of nothing but -inf, dH complete, TP=1, DTensor
weights; what is compared is in tensor_parallel_worker.
"""

import pytest
import tensor_parallel_worker
import torch
import torch.multiprocessing as multiprocessing

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.parametrize(
    "kind", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, two_gpus], id="two_gpus")]
)
def test_two_ranks_equal_one(tmp_path, kind):
    args = 2, str(tmp_path / "store"), kind
    multiprocessing.spawn(tensor_parallel_worker.main, args=args, nprocs=2, join=True)
