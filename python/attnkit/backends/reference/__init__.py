"""The reference backend: the semantics of the IR in float64 numpy, materialised and never optimised."""

from attnkit.backends.reference.backend import attend as attend, backend as backend
from attnkit.backends.reference.codec import Encoded as Encoded, decode as decode, encode as encode
from attnkit.backends.reference.evaluate import evaluate as evaluate
from attnkit.backends.reference.run import Gradients as Gradients, gradients as gradients, run as run
