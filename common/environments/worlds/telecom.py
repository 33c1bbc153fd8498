"""telecom-mini: a phone without service. The agent repairs the line, and the user repairs the phone as instructed."""

import random
from collections.abc import Mapping
from typing import Any

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
from palimpsest.common.environments.worlds.names import FIRST, LAST

POLICY = """\
You are the technical agent of a phone company. The customer's phone has no mobile internet. Find every cause and
remove it. Some causes are on the line, which you change with the tools; others are on the phone, which only the
customer can change: give one clear instruction in a message, such as "Please turn airplane mode off." Ask "What
does your phone show?" to learn the settings of the phone.
Change nothing that is not a cause.
Rules:
1. A line that is suspended for an unpaid bill can be resumed only after the customer has paid: take the payment,
then resume the line.
2. A line without data can get 2 gigabytes for the price of its plan; tell the customer this price as a plain
number.
3. Roaming is turned on only for a customer who is abroad.
4. A line whose contract has ended is not changed at all: call close_case with the result contract_ended.
When the internet works, call close_case with the result solved, and state it without a question."""

SETTINGS: Mapping[str, tuple[bool, tuple[str, ...]]] = {
    "airplane mode": (False, ("airplane",)),
    "mobile data": (True, ("mobile data",)),
    "data saver": (False, ("data saver", "saver")),
    "sim card inserted": (True, ("sim",)),
}
"""Setting of the phone -> its right value, and the words that name it in an instruction."""
ON_WORDS = ("turn on", "switch on", "enable", "insert", "activate", " on.", " on ")
OFF_WORDS = ("turn off", "switch off", "disable", "remove", "deactivate", " off.", " off ")
SHOWING = ("show", "settings", "what do you see", "check your phone")
RESULTS = ("solved", "contract_ended")


@tool
def get_customer(state: Case, phone: str) -> str:
    """Show the customer of a phone number: name, plan, bill, and whether the customer is abroad.

    phone: Phone number, such as 555-0123.
    """
    return compact(state.row("customers", phone))


@tool
def get_line(state: Case, phone: str) -> str:
    """Show the state of a line: contract, suspension, roaming, data left in megabytes.

    phone: Phone number.
    """
    return compact(state.row("lines", phone))


@tool
def get_price(state: Case, plan_name: str) -> str:
    """Show the price of 2 gigabytes in a plan.

    plan_name: Name of the plan.
    """
    return str(state.row("plans", plan_name)["price"])


@tool
def take_payment(state: Case, phone: str, amount: int) -> str:
    """Take the payment of an unpaid bill.

    phone: Phone number.
    amount: The whole amount of the bill.
    """
    customer = state.row("customers", phone)
    if amount != customer["unpaid"] or not amount:
        raise ToolFailed(f"the unpaid amount is {customer['unpaid']}")
    customer["unpaid"] = 0
    return "paid"


@tool
def resume_line(state: Case, phone: str) -> str:
    """Resume a suspended line.

    phone: Phone number.
    """
    line = state.row("lines", phone)
    if not line["suspended"]:
        raise ToolFailed("the line is not suspended")
    if state.row("customers", phone)["unpaid"]:
        raise ToolFailed("the bill is not paid")
    line["suspended"] = False
    return "resumed"


@tool
def set_roaming(state: Case, phone: str, on: bool) -> str:
    """Turn roaming of a line on or off.

    phone: Phone number.
    on: Whether roaming is on.
    """
    state.row("lines", phone)["roaming"] = on
    return "set"


@tool
def add_data(state: Case, phone: str) -> str:
    """Add 2 gigabytes to a line.

    phone: Phone number.
    """
    line = state.row("lines", phone)
    line["megabytes"] += 2000
    return f"{line['megabytes']} megabytes left"


@tool
def close_case(state: Case, phone: str, result: str) -> str:
    """Close the case.

    phone: Phone number.
    result: solved or contract_ended.
    """
    if result not in RESULTS:
        raise ToolFailed(f"result must be {' or '.join(RESULTS)}")
    state.row("lines", phone)["case"] = result
    return "closed"


def act(case: Case, text: str) -> str | None:
    """Return what the user reports after an instruction or a question about the phone; None if the text has neither."""
    lower, phone = f" {text.lower()} ", case.table("phone")
    if "?" in text:
        if not any(word in lower for word in SHOWING):
            return None
        return "My phone shows: " + ", ".join(f"{name} {_word(value)}" for name, value in phone.items()) + "."
    named = [name for name, (_, words) in SETTINGS.items() if any(word in lower for word in words)]
    on, off = (any(word in lower for word in words) for words in (ON_WORDS, OFF_WORDS))
    if not named or on == off:
        return None
    for name in named:
        phone[name] = on
    return "I did it: " + ", ".join(f"{name} {_word(on)}" for name in named) + "."


def _word(value: bool) -> str:
    return "on" if value else "off"


LINE_CAUSES = ("suspended", "no data", "roaming off")


def plan(rng: random.Random) -> WorldTask:
    """Generate a task with one to three causes."""
    database, phone = _database(rng)
    customer, line = database["customers"][phone], database["lines"][phone]
    device = {name: right for name, (right, _) in SETTINGS.items()}
    database["phone"] = device
    ended = rng.random() < 0.12
    causes = pick(rng, (*LINE_CAUSES, *SETTINGS), rng.randrange(1, 4))
    customer["abroad"] = "roaming off" in causes or rng.random() < 0.2
    line.update(contract="ended" if ended else "active", roaming=customer["abroad"], suspended=False)
    line["megabytes"], customer["unpaid"] = rng.randrange(200, 5000), 0
    steps: list[Any] = []
    amounts = ""
    for cause in causes:
        if cause == "suspended":
            line["suspended"], customer["unpaid"] = True, rng.randrange(10, 200)
            steps.append(("take_payment", {"phone": phone, "amount": customer["unpaid"]}))
            steps.append(("resume_line", {"phone": phone}))
        elif cause == "no data":
            line["megabytes"], amounts = 0, str(database["plans"][customer["plan"]]["price"])
            steps += [("get_price", {"plan_name": customer["plan"]}), ("add_data", {"phone": phone})]
        elif cause == "roaming off":
            line["roaming"] = False
            steps.append(("set_roaming", {"phone": phone, "on": True}))
        else:
            device[cause] = not device[cause]
            steps.append(f"Please turn {cause.removesuffix(' inserted')} {_word(not device[cause])}.")
    if ended:
        steps, amounts = [], ""
    steps.append(("close_case", {"phone": phone, "result": "contract_ended" if ended else "solved"}))
    facts = (
        Fact(("phone number", "your number", "which number"), f"My phone number is {phone}."),
        Fact(("abroad", "where are you"), "I am abroad." if customer["abroad"] else "I am at home."),
    )
    begin = ("What is your phone number?", "Where are you?", "What does your phone show?")
    look = (("get_customer", {"phone": phone}), ("get_line", {"phone": phone}))
    ending = f"It works. The data costs {amounts}." if amounts else "The contract has ended." if ended else "It works."
    kind = "ended" if ended else "+".join(sorted(causes))
    request = rng.choice(("My phone has no mobile internet.", "I cannot open any page on my phone."))
    return WorldTask(database, request, facts, (*begin, *look, *steps, ending), (amounts,) if amounts else (), kind)


def _database(rng: random.Random) -> tuple[dict[str, Any], str]:
    """Return a database, and the phone number of the customer who calls."""
    phones = [f"555-{number:04d}" for number in rng.sample(range(10000), 3)]
    plans = {name: {"price": rng.randrange(3, 60)} for name in ("basic", "family", "travel")}
    customers, lines = {}, {}
    for phone in phones:
        customers[phone] = {
            "name": f"{rng.choice(FIRST)} {rng.choice(LAST)}",
            "plan": rng.choice(list(plans)),
            "unpaid": rng.choice((0, rng.randrange(10, 200))),
            "abroad": rng.random() < 0.3,
        }
        lines[phone] = {
            "contract": "active",
            "suspended": rng.random() < 0.3,
            "roaming": rng.random() < 0.3,
            "megabytes": rng.randrange(5000),
        }
    return {"customers": customers, "lines": lines, "plans": plans}, phones[0]


TOOLS = (get_customer, get_line, get_price, take_payment, resume_line, set_roaming, add_data, close_case)
WORLD = WorldDefinition("telecom-mini", POLICY, TOOLS, plan, act)
TelecomMini = WORLD.environment("1")
