"""The schema and the table of the chart's values follow from the comments of values.yaml."""

import json

import pytest

from tools import chart

VALUES = """\
# The comment of the file.

# The workers. More
# about them.
workers:
  # How many.
  # @schema {"minimum": 1}
  count: 2
  # Free keys.
  # @schema {"type": "object", "additionalProperties": {"type": "string"}}
  labels: {}
# A list.
extra: []
"""


def test_the_schema_follows_from_defaults_and_comments() -> None:
    schema = json.loads(chart.schema(VALUES))
    assert schema["additionalProperties"] is False
    workers = schema["properties"]["workers"]
    assert (workers["description"], workers["additionalProperties"]) == ("The workers. More about them.", False)
    assert workers["properties"]["count"] == {"description": "How many.", "type": "integer", "minimum": 1}
    assert workers["properties"]["labels"]["additionalProperties"] == {"type": "string"}
    assert schema["properties"]["extra"]["type"] == "array"


def test_the_table_has_a_row_for_each_value() -> None:
    assert chart.table(VALUES).splitlines()[-3:] == [
        "| `workers.count` | `2` | How many. |",
        "| `workers.labels` | `{}` | Free keys. |",
        "| `extra` | `[]` | A list. |",
    ]


def test_a_value_without_a_comment_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"workers\.size has no comment"):
        chart.schema("# The workers.\nworkers:\n  size: 1\n")
