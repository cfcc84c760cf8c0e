"""Importing Energon with its doors closed.

Energon reads shards through webdataset, which decodes pickles found in them unless told otherwise
before its import, and it makes megatron-core send file access through the multi-storage client.
Import Energon's names from here, so that neither can happen.
"""

import os

os.environ["WDS_SECURE"] = "1"
# The workers are forks; the tokenizers library would warn that its threads do not survive one.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import webdataset.utils
from megatron.core.msc_utils import MultiStorageClientFeature
from megatron.energon import SavableDataset, WorkerConfig
from megatron.energon.errors import reraise_exception
from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator
from megatron.energon.savable_loader import BasicDataLoader

# Somebody may have imported webdataset before us; it consults this flag at every use.
webdataset.utils.enforce_security = True
MultiStorageClientFeature.disable()

__all__ = [
    "BasicDataLoader",
    "SavableDataset",
    "WebdatasetPreparator",
    "WorkerConfig",
    "reraise_exception",
]
