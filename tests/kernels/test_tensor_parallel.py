# SPDX-License-Identifier: Apache-2.0
"""Vocabulary-parallel ops on two gloo ranks equal the unsharded result (cases 70, 71).

Targets on either rank, uneven shards, a shard of nothing but -inf, dH complete, TP=1, DTensor
weights; what is compared is in tensor_parallel_worker.
"""

import tensor_parallel_worker
import torch.multiprocessing as multiprocessing


def test_two_ranks_equal_one(tmp_path):
    multiprocessing.spawn(
        tensor_parallel_worker.main, args=(2, str(tmp_path / "store")), nprocs=2, join=True
    )
