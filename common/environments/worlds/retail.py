"""retail-mini: orders of an online shop. Cancel, return, exchange, change an address, tell an amount, or deny."""

import random
from typing import Any, Literal

from palimpsest.common.environments.authoring.tools import tool
from palimpsest.common.environments.single_call import ToolFailed
from palimpsest.common.environments.worlds.case import (
    Case,
    Fact,
    WorldDefinition,
    WorldTask,
    compact,
    pick,
)
from palimpsest.common.environments.worlds.names import CITIES, FIRST, LAST, STREETS

POLICY = """\
You are the service agent of a shop. Help the customer with the tools. Act only after the customer has given the
email address of the account, and only on orders of that account. Tell the customer amounts as plain numbers.
Rules:
1. Only an order with the status pending can be cancelled.
2. Only an order with the status pending can get another address.
3. An item can be returned if its order was delivered at most 30 days ago.
4. An item can be exchanged for another color of the same product if its order was delivered at most 30 days ago and
the shop has that color in stock.
5. A returned or cancelled order is refunded to the payment method of the order, no other one.
If a rule forbids the request, change nothing: call deny_request with the number of the rule and tell the customer.
When everything is done, state it without a question."""

PRODUCTS = ["lamp", "kettle", "backpack", "blanket", "clock", "speaker", "chair", "mug"]
COLORS = ["black", "white", "green", "blue", "red"]
METHODS = ("card", "gift card", "bank transfer")
REASONS = ("no longer needed", "ordered by mistake")


@tool
def find_customer(state: Case, email: str) -> str:
    """Find the account of an email address, with the numbers of its orders.

    email: Email address of the account.
    """
    return compact(state.row("customers", email))


@tool
def get_order(state: Case, order_id: str) -> str:
    """Show an order.

    order_id: Number of the order, such as R1234.
    """
    return compact(state.row("orders", order_id))


@tool
def get_stock(state: Case, product: str) -> str:
    """Show the colors of a product that are in stock.

    product: Name of the product.
    """
    return compact(state.row("stock", product))


@tool
def cancel_order(state: Case, order_id: str, reason: Literal["no longer needed", "ordered by mistake"]) -> str:
    """Cancel an order.

    order_id: Number of the order.
    reason: Reason of the customer.
    """
    order = state.row("orders", order_id)
    if order["status"] != "pending":
        raise ToolFailed(f"the order is {order['status']}")
    order["status"], order["reason"] = "cancelled", reason
    return "cancelled"


@tool
def change_address(state: Case, order_id: str, address: str) -> str:
    """Send an order to another address.

    order_id: Number of the order.
    address: Street with number, and city, as the customer gave it.
    """
    order = state.row("orders", order_id)
    if order["status"] != "pending":
        raise ToolFailed(f"the order is {order['status']}")
    order["address"] = address
    return "changed"


@tool
def return_item(state: Case, order_id: str, product: str) -> str:
    """Take an item back and refund it.

    order_id: Number of the order.
    product: Name of the product.
    """
    item = _item(state, order_id, product)
    item["state"] = "returned"
    return f"returned, {item['price']} refunded"


@tool
def exchange_item(state: Case, order_id: str, product: str, color: str) -> str:
    """Exchange an item for another color of the product.

    order_id: Number of the order.
    product: Name of the product.
    color: The new color.
    """
    item = _item(state, order_id, product)
    stock = state.row("stock", product)
    if stock.get(color, 0) < 1:
        raise ToolFailed(f"{product} in {color} is not in stock")
    stock[color] -= 1
    item["state"], item["color"] = "exchanged", color
    return "exchanged"


@tool
def deny_request(state: Case, order_id: str, rule: int) -> str:
    """Record that a rule forbids the request.

    order_id: Number of the order that the request is about.
    rule: Number of the rule.
    """
    state.row("orders", order_id).setdefault("denied", []).append(rule)
    return "recorded"


def _item(state: Case, order_id: str, product: str) -> dict[str, Any]:
    order = state.row("orders", order_id)
    if order["status"] != "delivered":
        raise ToolFailed(f"the order is {order['status']}")
    for item in order["items"]:
        if item["product"] == product and item["state"] == "sold":
            found: dict[str, Any] = item
            return found
    raise ToolFailed(f"the order has no {product} that was sold")


def plan(rng: random.Random) -> WorldTask:
    """Generate a task."""
    database, email, order_id = _database(rng)
    order, kind = database["orders"][order_id], rng.choice(KINDS)
    item = rng.choice(order["items"])
    product, stock = item["product"], database["stock"][item["product"]]
    order["status"] = "pending" if kind in ("cancel", "address") else "delivered"
    order["delivered_days_ago"] = None if order["status"] == "pending" else rng.randrange(2, 31)
    color = rng.choice([one for one in COLORS if one != item["color"]])
    stock[color] = rng.randrange(1, 5)
    address = f"{rng.randrange(1, 99)} {rng.choice(STREETS)} Street, {rng.choice(CITIES)}"
    reason, total = rng.choice(REASONS), sum(one["price"] for one in order["items"])
    call: tuple[str, dict[str, Any]]
    facts = [Fact(("email", "account"), f"My email address is {email}."), Fact(("order",), f"It is order {order_id}.")]
    amounts: tuple[str, ...] = ()
    match kind:
        case "cancel":
            request, call = "I want to cancel an order.", ("cancel_order", {"order_id": order_id, "reason": reason})
            facts.append(Fact(("reason", "why"), f"The reason: {reason}."))
            amounts = (str(total),)
            facts.append(Fact(("anything else",), "How much was the order in total?"))
        case "address":
            request = "My order must go to another address."
            call = ("change_address", {"order_id": order_id, "address": address})
            facts.append(Fact(("address",), f"The new address is: {address}"))
        case "return" | "late return":
            request, call = (
                f"I want to return a {product}.",
                ("return_item", {"order_id": order_id, "product": product}),
            )
            amounts = (str(item["price"]),) if kind == "return" else ()
            facts.append(Fact(("anything else",), "How much do I get back?"))
        case "exchange" | "no stock":
            request = f"I want another color for a {product} that I bought."
            call = ("exchange_item", {"order_id": order_id, "product": product, "color": color})
            facts.append(Fact(("color",), f"I want it in {color}."))
        case _:
            request, call = "I want to cancel an order.", ("", {})
            order["status"] = "shipped" if kind == "late cancel" else order["status"]
            facts.append(Fact(("reason", "why"), f"The reason: {reason}."))
    denied = {"late return": 3, "no stock": 4, "late cancel": 1}.get(kind)
    if kind == "late return":
        order["delivered_days_ago"] = rng.randrange(31, 90)
    if kind == "no stock":
        stock[color] = 0
    if denied:
        call = ("deny_request", {"order_id": order_id, "rule": denied})
    lookups: tuple[Any, ...] = (("find_customer", {"email": email}), ("get_order", {"order_id": order_id}))
    ending = (
        f"It is done. The amount is {amounts[0]}."
        if amounts
        else "It is denied by a rule."
        if denied
        else "It is done."
    )
    questions = (
        "What is the email address of the account?",
        "Which order is it?",
        *(["Which details?"] * (len(facts) - 2)),
    )
    return WorldTask(database, request, tuple(facts), (*questions, *lookups, call, ending), amounts, kind)


KINDS = ("cancel", "address", "return", "exchange", "late return", "no stock", "late cancel")


def _database(rng: random.Random) -> tuple[dict[str, Any], str, str]:
    """Return a database, and the email address and the order of the customer who calls."""
    numbers = rng.sample(range(1000, 9999), 6)
    names = list(zip(pick(rng, FIRST, 3), pick(rng, LAST, 3), strict=True))
    emails = [f"{first.lower()}.{last.lower()}@post.example" for first, last in names]
    orders, customers = {}, {}
    for owner, email in enumerate(emails):
        own = [f"R{number}" for number in numbers[2 * owner : 2 * owner + 2]]
        customers[email] = {"name": " ".join(names[owner]), "orders": own}
        for order_id in own:
            days = rng.choice([None, rng.randrange(1, 90)])
            orders[order_id] = {
                "order_id": order_id,
                "account": email,
                "status": "pending" if days is None else "delivered",
                "delivered_days_ago": days,
                "payment": rng.choice(METHODS),
                "address": f"{rng.randrange(1, 99)} {rng.choice(STREETS)} Street, {rng.choice(CITIES)}",
                "items": [
                    {"product": one, "color": rng.choice(COLORS), "price": rng.randrange(5, 200), "state": "sold"}
                    for one in pick(rng, PRODUCTS, rng.randrange(1, 4))
                ],
            }
    stock = {product: {color: rng.randrange(4) for color in COLORS} for product in PRODUCTS}
    owner = rng.randrange(3)
    return {"customers": customers, "orders": orders, "stock": stock}, emails[owner], f"R{numbers[2 * owner]}"


TOOLS = (
    find_customer,
    get_order,
    get_stock,
    cancel_order,
    change_address,
    return_item,
    exchange_item,
    deny_request,
)
WORLD = WorldDefinition("retail-mini", POLICY, TOOLS, plan)
RetailMini = WORLD.environment("1")
