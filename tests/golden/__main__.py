"""`make golden`."""

from tests.golden import write

write()
