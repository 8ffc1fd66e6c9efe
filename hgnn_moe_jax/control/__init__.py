"""Who decides the strengths: pure state machines on arrays, in the manner of optax.

`base` has the contract, `schedules` the factors over time, each other module one controller.
"""
