"""All operations in one place, in a fixed order."""

from cispo.tasks.dict_operations import DICT_OPERATIONS
from cispo.tasks.integer_operations import INTEGER_OPERATIONS
from cispo.tasks.list_operations import LIST_OPERATIONS
from cispo.tasks.operations import Operation
from cispo.tasks.text_operations import TEXT_OPERATIONS

OPERATIONS: tuple[Operation, ...] = INTEGER_OPERATIONS + LIST_OPERATIONS + TEXT_OPERATIONS + DICT_OPERATIONS
