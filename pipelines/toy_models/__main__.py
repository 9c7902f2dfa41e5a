"""`python -m pipelines.toy_models [key=value ...]`: pretrain the small ToyWorld models (see `build.py`)."""

import sys

from infra.config import ConfigError, load_config
from pipelines.toy_models.build import build_toy_models
from pipelines.toy_models.settings import ToyModelsConfig

if __name__ == "__main__":
    try:
        build_toy_models(load_config(ToyModelsConfig, None, sys.argv[1:]))
    except ConfigError as error:
        sys.exit(str(error))
