"""The offline planner: what a diffusion pipeline holds and what fits, from configurations alone.

``named`` and ``model`` say what there is, ``calls`` builds each part and its inputs on fake tensors, ``figures`` plans
them, ``survey`` adds up and extrapolates, ``largest`` and ``sweep`` ask many sizes, ``answer`` is all of it as data,
``terminal`` and ``page`` show it.
"""
