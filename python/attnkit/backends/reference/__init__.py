"""The reference backend: the semantics of the IR in float64 numpy, materialised and never optimised."""

from attnkit.backends.reference.attend import attend as attend
from attnkit.backends.reference.backend import backend as backend
from attnkit.backends.reference.evaluate import evaluate as evaluate
