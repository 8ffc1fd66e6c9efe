"""Who decides the strengths: pure state machines on arrays, in the manner of optax.

`base` has the contract, `schedules` the factors over time, `filters` and `triggers` the small state
machines, `supervision` what puts laws, triggers and bounds together. Controllers: `constant`,
`adaptive`, `feedback`, and those of `strategies`. `plant` is a bench to try them on.
"""
