"""``targets/*.toml``: the definition of one consistency group, read and checked.

The same file serves every node and every command. `load` gives a `Definition` in which everything has been checked
once; behind it nobody checks again. `check` gives every problem of a file instead of the first.

``model`` has the tables of a file and look-ups in them, ``values`` sizes and addresses, ``iscsi`` what belongs to the
iSCSI target, ``shape`` turns a wrong key or type into a message, ``checks`` finds what is wrong in a file of the right
shape, ``reading`` joins them; ``configuration`` is what of it can change while the group runs, ``changes`` how.
"""

from blockrepl.definition.configuration import Configuration, configuration_from, configuration_of
from blockrepl.definition.model import NO_SECONDARY, Definition, Group, Node, Policy, Role, Volume
from blockrepl.definition.reading import check, load
from blockrepl.definition.values import Address, Size, parse_address, parse_size

__all__ = [
    "NO_SECONDARY",
    "Address",
    "Configuration",
    "Definition",
    "Group",
    "Node",
    "Policy",
    "Role",
    "Size",
    "Volume",
    "check",
    "configuration_from",
    "configuration_of",
    "load",
    "parse_address",
    "parse_size",
]
