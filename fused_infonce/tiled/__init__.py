"""The loss of batches whose logits do not fit in one tensor: tile by tile, in memory that does not grow with N×M.

``problem`` holds a call's normalised rows, ``one_pass`` and ``two_pass`` are the algorithms, ``gradients``
finishes both. They call the operations of ``backend.TileBackend``, which torch and the Triton kernels implement.
"""
