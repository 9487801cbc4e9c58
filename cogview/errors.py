"""The errors of a bad *run*. Each names the key, the value and the remedy. A bad *record* is a value, not an error."""


class CogViewError(Exception):
    """Base of everything that stops a run on purpose. The command line prints the message and exits with 2."""


class ConfigError(CogViewError):
    """A setting that cannot work: the message names the field, its value and what would be accepted."""


class SchemaError(CogViewError):
    """Data whose columns, dtypes or lengths are not those of the door it came through."""


class ManifestError(CogViewError):
    """Files that are missing, cut or altered against their manifest."""


class VocabularyError(CogViewError):
    """Tokens of another tokenizer, codebook or vocabulary than the model's."""


class CheckpointError(CogViewError):
    """A checkpoint that is damaged, or that belongs to another config or tokenizer."""


class DivergedError(CogViewError):
    """A loss that stayed non-finite."""


class StorageError(CogViewError):
    """A disk that is full or that refuses writes."""
