# SPDX-License-Identifier: Apache-2.0
"""KL-regularised Q-Learning for language models: the method, the training loop, the command line.

The names below are the whole public surface. They are resolved on first use, so that
`klq --help` and `import klq` do not pay for importing torch and transformers. The three kernel
functions are re-exported for people who bring their own training loop.
"""

from importlib import import_module

_HOME = {
    "KLQConfig": "klq.config",
    "KLQTrainer": "klq.trainer",
    "Preset": "klq.presets",
    "Rollout": "klq.rollout",
    "load_preset": "klq.presets",
    "klq_loss": "klq_kernels",
    "klq_targets": "klq_kernels",
    "linear_klq_loss": "klq_kernels",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'klq' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
