"""Floor 1 of peft-zoo: operators that take tensors and return tensors, and know nothing of peft.

Each operator is one file: the plain-PyTorch reference first, then the operator registered with ``torch.library``, then
the public function; its Triton kernels are in the file of the same name that ends in ``_triton``. ``base`` says how
they are made and which of the two paths runs, ``docs/kernels.md`` how to use them.

* ``merge_lora``: any number of LoRA updates added to a weight in one pass.
* ``magnitude_threshold``: the exact k-th smallest magnitude of a matrix, given or only seen in tiles.
* ``kernelized_merge``, ``kernelized_linear``: the sparse kernel-matrix update of SNELL, formed, added or applied.
* ``sparse_mask``, ``sparse_support``, ``masked_linear``: what sparse methods share.
* ``budget``: how SNELLA divides its non-zero weights among layers.
* ``low_rank``, ``low_rank_random``: best approximations of factored, dense and only multiplied matrices.
* ``allocate``, ``rank_plan``: one budget divided among modules; a rank for each from its singular values.
* ``normal_float``, ``bit_packing``, ``lloyd_levels``: matrices of 2 to 8 bits a number; products: ``nf_linear``.
* ``quantized_low_rank``, ``bit_plan``: a matrix as a quantized one and one of low rank; bits for many under a budget.
* ``random_basis`` and what is made of it: random matrices that are a function of a seed, and products with them.
* ``bch``, ``message_test``: short error-correcting codes, and the exact test of a secret message.
* ``keyed_decoder``, ``jpeg``, ``image_quality``: bits read from images by a key; what JPEG does to them; PSNR and SSIM.
"""
