"""The run-time checker of annotations, shapes included, that the whole test run is under."""

from beartype import BeartypeConf, beartype

# An int where a float is asked for is fine, as for type checkers.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
