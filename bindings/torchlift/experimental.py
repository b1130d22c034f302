"""Names that functorch 0.2 has in functorch.experimental.

>>> from torchlift.experimental import jvp, replace_all_batch_norm_modules_
"""

from torchlift._batch_norm import replace_all_batch_norm_modules_
from torchlift._forward import jvp
from torchlift._jacobian import hessian, jacfwd

__all__ = ["hessian", "jacfwd", "jvp", "replace_all_batch_norm_modules_"]
