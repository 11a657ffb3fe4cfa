"""Messages of the contract as frozen dataclasses, and back: the name of a field joins the two, its type says how.

    contract                                dataclass
    --------                                ---------
    double, int32, uint64, bool, string     float, int, int, bool, str
    repeated                                tuple
    message                                 dataclass, by the same rules
    message of one repeated field           that field's tuple, where the dataclass has a tuple (TokenIds, Chat)
    enum, such as FINISH_REASON_EOS         StrEnum or Literal of what follows the prefix, in any case ("EOS")
    google.protobuf.Duration                float, in seconds
    google.protobuf.Timestamp               datetime, in UTC
    unset, or empty where that is the same  what the field's metadata ``when_unset`` returns; else None, where its type
                                            admits None; else the field's default

Descriptors and type hints are read once, when a reader or a writer is made.
"""

from steering.convert.fields import WHEN_UNSET, FieldError, enum_numbers
from steering.convert.read import Reader, reader
from steering.convert.write import Accept, Writer, oneof_writer, writer

__all__ = ["WHEN_UNSET", "Accept", "FieldError", "Reader", "Writer", "enum_numbers", "oneof_writer", "reader", "writer"]
