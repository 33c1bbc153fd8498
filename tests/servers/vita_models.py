"""The models of VitaBench's simulated user and of its judge, scripted. They see only the requests."""

import json
import re
from typing import Any

from palimpsest.common.environments.tool_calls import render
from tests.servers.chat_endpoint import Answer, spoken

USAGE = {"prompt_tokens": 100, "completion_tokens": 10}
ORDERED = "tool: Order(order_id:"
"""What VitaBench shows the judge of a tool's result that made an order."""


def user(request: dict[str, Any]) -> Answer:
    """End at "Goodbye.", and say yes to anything else."""
    return spoken("###STOP###" if request["messages"][-1]["content"] == "Goodbye." else "Yes.", usage=USAGE)


def rubrics(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rubrics that a request to the judge asks about, as it shows them; none if it asks for one word."""
    shown = re.search(r"<current_rubrics>\n(.*)\n</current_rubrics>", request["messages"][-1]["content"], re.DOTALL)
    return json.loads(shown[1]) if shown else []


def judge(request: dict[str, Any]) -> Answer:
    """Judge that each rubric is met from the first window on in which an order was made."""
    asked = rubrics(request)
    made = ORDERED in request["messages"][-1]["content"]
    found = [one | {"meetExpectation": one["meetExpectation"] or made} for one in asked]
    return spoken(json.dumps(found) if asked else "yes", usage=USAGE)


def strict_judge(request: dict[str, Any]) -> Answer:
    """Judge that no rubric is met."""
    asked = rubrics(request)
    return spoken(json.dumps([one | {"meetExpectation": False} for one in asked]) if asked else "yes", usage=USAGE)


def orders(task: dict[str, Any]) -> list[str]:
    """Return the messages of a model that makes the orders which this task of delivery expects."""
    expected = task["evaluation_criteria"]["expected_states"][0]["required_orders"]
    made = [
        {
            "user_id": order["user_id"],
            "store_id": order["store_id"],
            "product_ids": [product["product_id"] for product in order["products"]],
            "product_cnts": [product["quantity"] for product in order["products"]],
            "address": order["location"]["address"],
            "dispatch_time": order["dispatch_time"] or task["environment"]["time"],
        }
        for order in expected
    ]
    return [render("create_delivery_order", arguments) for arguments in made]
