"""The recommendation sample: a small Llama over the semantic IDs of MovieLens-100K's films, in `samples/llama-movielens`.

Trained by `polyspec task=train modality=recommendation train.items.titles=false` (see `train` beside this). Titles belong to
the data set, whose licence forbids redistribution: they are fetched when the sample is first used.
"""

from pathlib import Path

from polyspec.errors import CheckpointError
from polyspec.files import shipped
from polyspec.modalities.recommendation.data import movielens
from polyspec.modalities.recommendation.items import Items

NAME = "llama-movielens"


def sample_path() -> Path:
    """The folder of the shipped checkpoint."""
    return shipped(NAME)


def existing_sample() -> Path:
    """The same; CheckpointError if it is not there."""
    folder = sample_path()
    if not (folder / "model.safetensors").exists():
        raise CheckpointError(f"no sample recommender in {folder}: reinstall polyspec, or give target=, a folder of your own")
    return folder


def with_titles(items: Items) -> Items:
    """The sample's items with the films' titles; as they are where those can neither be found nor fetched."""
    try:
        titles = movielens().titles
    except CheckpointError:
        return items
    return Items(items.ids, items.tokens, [titles[i] for i in items.ids], items.prefix, items.max_history)
