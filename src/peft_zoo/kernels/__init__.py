"""Floor 1 of peft-zoo: operators that take tensors and return tensors, and know nothing of peft.

Each operator is one file (or a small family of files): the plain-PyTorch reference first, then the operator
registered with ``torch.library``, then the public function.

* ``kernelized_linear``: the sparse kernel-matrix update of SNELL, applied or formed without saving it.
* ``magnitude_threshold``: the exact k-th smallest magnitude of a matrix that is only seen in tiles.
* ``budget``: how SNELLA divides its non-zero weights among layers.
"""
