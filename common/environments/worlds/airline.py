"""airline-mini: reservations of an airline. Change a flight, cancel, add bags, move to another cabin, or deny."""

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
from palimpsest.common.environments.worlds.names import CITIES, FIRST, LAST

POLICY = """\
You are the service agent of an airline. Help the customer with the tools. Act only after the customer has given the
member number, and only on reservations of that member. Tell the customer amounts as plain numbers. Today is day
100.
Rules:
1. A reservation in the cabin saver cannot get another flight.
2. A reservation can be cancelled if it was booked today or yesterday, or if it is insured.
3. A flight that departed before today cannot be changed or cancelled.
4. Each passenger has free bags: none for the status blue, 1 for silver, 2 for gold. Each further bag costs 40.
5. A change to another flight or cabin costs the difference of the two prices for each passenger, and nothing if the
new price is lower.
6. A flight can be chosen only if it has a free seat for each passenger of the reservation.
If rule 1, 2, 3 or 6 forbids the request, change nothing: call deny_request with the number of the rule and tell the
customer.
When everything is done, state it without a question."""

FREE_BAGS = {"blue": 0, "silver": 1, "gold": 2}
BAG_PRICE = 40
TODAY = 100
CABINS = ("saver", "economy", "business")


@tool
def get_member(state: Case, member: str) -> str:
    """Show a member, with the status and the reservations.

    member: Member number, such as M12345.
    """
    return compact(state.row("members", member))


@tool
def get_reservation(state: Case, code: str) -> str:
    """Show a reservation.

    code: Code of the reservation, such as K2J9.
    """
    return compact(state.row("reservations", code))


@tool
def search_flights(state: Case, origin: str, destination: str) -> str:
    """Show the flights from a city to another: number, day of departure, free seats and price by cabin.

    origin: City of departure.
    destination: City of arrival.
    """
    places = origin.strip().title(), destination.strip().title()
    found = [one for one in state.table("flights").values() if (one["origin"], one["destination"]) == places]
    return "\n".join(map(compact, found)) or "there is no such flight"


@tool
def change_flight(state: Case, code: str, flight: str) -> str:
    """Move a reservation to another flight, in the same cabin.

    code: Code of the reservation.
    flight: Number of the new flight, such as F204.
    """
    reservation, new = state.row("reservations", code), state.row("flights", flight)
    old = state.row("flights", reservation["flight"])
    _move(reservation, old, new, reservation["cabin"], reservation["cabin"])
    reservation["flight"] = flight
    return f"changed, {reservation['paid']} paid for it"


@tool
def change_cabin(state: Case, code: str, cabin: Literal["saver", "economy", "business"]) -> str:
    """Move a reservation to another cabin of the same flight.

    code: Code of the reservation.
    cabin: The new cabin.
    """
    reservation = state.row("reservations", code)
    flight = state.row("flights", reservation["flight"])
    _move(reservation, flight, flight, reservation["cabin"], cabin)
    reservation["cabin"] = cabin
    return f"changed, {reservation['paid']} paid for it"


@tool
def cancel_reservation(state: Case, code: str) -> str:
    """Cancel a reservation.

    code: Code of the reservation.
    """
    reservation = state.row("reservations", code)
    if reservation["status"] != "booked":
        raise ToolFailed(f"the reservation is {reservation['status']}")
    reservation["status"] = "cancelled"
    state.row("flights", reservation["flight"])["seats"][reservation["cabin"]] += reservation["passengers"]
    return "cancelled"


@tool
def add_bags(state: Case, code: str, bags: int, charge: int) -> str:
    """Add bags to a reservation.

    code: Code of the reservation.
    bags: Number of bags to add.
    charge: Amount that the customer pays for them.
    """
    reservation = state.row("reservations", code)
    if not 1 <= bags <= 20:
        raise ToolFailed("bags must be from 1 to 20")
    reservation["bags"] += bags
    reservation["paid"] = charge
    return f"added, {reservation['bags']} bags in all"


@tool
def deny_request(state: Case, code: str, rule: int) -> str:
    """Record that a rule forbids the request.

    code: Code of the reservation that the request is about.
    rule: Number of the rule.
    """
    state.row("reservations", code).setdefault("denied", []).append(rule)
    return "recorded"


def _move(reservation: dict[str, Any], old: dict[str, Any], new: dict[str, Any], was: str, cabin: str) -> None:
    """Move the passengers, and record what they pay. Raises ToolFailed."""
    count = reservation["passengers"]
    if reservation["status"] != "booked":
        raise ToolFailed(f"the reservation is {reservation['status']}")
    if (old["flight"], was) == (new["flight"], cabin):
        raise ToolFailed("the reservation has this flight and cabin already")
    if new["seats"][cabin] < count:
        raise ToolFailed(f"{new['flight']} has {new['seats'][cabin]} free seats in {cabin}")
    old["seats"][was] += count
    new["seats"][cabin] -= count
    reservation["paid"] = max(0, new["prices"][cabin] - old["prices"][was]) * count


KINDS = ("change", "cabin", "cancel", "bags", "saver change", "late cancel", "departed", "full")
DENIED = {"saver change": 1, "late cancel": 2, "departed": 3, "full": 6}


def plan(rng: random.Random) -> WorldTask:
    """Generate a task."""
    database, member, code = _database(rng)
    reservation, kind = database["reservations"][code], rng.choice(KINDS)
    flights, count = database["flights"], reservation["passengers"]
    here = flights[reservation["flight"]]
    here["day"] = TODAY + rng.randrange(2, 20)
    other = rng.choice([one for one in flights.values() if one["day"] > TODAY and one is not here])
    other["origin"], other["destination"] = here["origin"], here["destination"]
    reservation["cabin"] = "saver" if kind == "saver change" else rng.choice(CABINS[1:])
    reservation["booked_on_day"], reservation["insured"] = TODAY - rng.randrange(2, 40), False
    cabin = "business" if reservation["cabin"] == "economy" else "economy"
    other["seats"][reservation["cabin"]] = here["seats"][cabin] = count + rng.randrange(4)
    if kind == "full":
        other["seats"][reservation["cabin"]] = count - 1
    facts = [
        Fact(("member", "number of your account"), f"My member number is {member}."),
        Fact(("reservation", "code"), f"The reservation is {code}."),
    ]
    look: list[Any] = [("get_member", {"member": member}), ("get_reservation", {"code": code})]
    amounts = ""
    call: tuple[str, dict[str, Any]]
    match kind:
        case "change" | "saver change" | "full":
            request = "I want to take another flight to the same city."
            facts.append(Fact(("which flight", "what flight", "new flight"), f"I want the flight {other['flight']}."))
            call = ("change_flight", {"code": code, "flight": other["flight"]})
            difference = max(0, other["prices"][reservation["cabin"]] - here["prices"][reservation["cabin"]])
            amounts = str(difference * count)
        case "cabin":
            request, call = "I want another cabin on my flight.", ("change_cabin", {"code": code, "cabin": cabin})
            facts.append(Fact(("cabin",), f"I want {cabin}."))
            amounts = str(max(0, here["prices"][cabin] - here["prices"][reservation["cabin"]]) * count)
        case "bags":
            request, bags = "I want to take more bags.", rng.randrange(1, 5)
            facts.append(Fact(("how many", "bags"), f"{bags} bags more."))
            free = max(0, FREE_BAGS[database["members"][member]["status"]] * count - reservation["bags"])
            amounts = str(max(0, bags - free) * BAG_PRICE)
            call = ("add_bags", {"code": code, "bags": bags, "charge": int(amounts)})
        case _:
            request, call = "I want to cancel my trip.", ("cancel_reservation", {"code": code})
            if kind != "late cancel" and rng.random() < 0.5:
                reservation["insured"] = True
            elif kind != "late cancel":
                reservation["booked_on_day"] = TODAY - rng.randrange(2)
    if kind == "departed":
        here["day"], reservation["insured"] = TODAY - rng.randrange(1, 9), True
        reservation["booked_on_day"] = here["day"] - rng.randrange(2, 20)
    look.append(("search_flights", {"origin": here["origin"], "destination": here["destination"]}))
    if kind in DENIED:
        call, amounts = ("deny_request", {"code": code, "rule": DENIED[kind]}), ""
    questions = ("What is your member number?", "Which reservation?", *(["Which details?"] * (len(facts) - 2)))
    ending = (
        f"It is done. You pay {amounts}." if amounts else "It is denied by a rule." if kind in DENIED else "It is done."
    )
    return WorldTask(
        database, request, tuple(facts), (*questions, *look, call, ending), (amounts,) if amounts else (), kind
    )


def _database(rng: random.Random) -> tuple[dict[str, Any], str, str]:
    """Return a database, and the number and the reservation of the member who calls."""
    flights = {}
    for flight in (f"F{one}" for one in rng.sample(range(100, 999), 8)):
        origin, destination = pick(rng, CITIES, 2)
        base = rng.randrange(60, 300)
        flights[flight] = {
            "flight": flight,
            "origin": origin,
            "destination": destination,
            "day": TODAY + rng.choice((-5, -2, 3, 6, 9, 12)),
            "seats": {cabin: rng.randrange(9) for cabin in CABINS},
            "prices": {
                "saver": base,
                "economy": base + rng.randrange(10, 90),
                "business": base * 2 + rng.randrange(99),
            },
        }
    list(flights.values())[-1]["day"] = TODAY + 4  # at least one flight besides that of the reservation departs later
    members, reservations = {}, {}
    codes = ["".join(rng.sample("BCDFGHJKLMNPQRSTVWXZ23456789", 5)) for _ in range(6)]
    numbers = [f"M{number}" for number in rng.sample(range(10000, 99999), 3)]
    for owner, number in enumerate(numbers):
        name = f"{rng.choice(FIRST)} {rng.choice(LAST)}"
        own = codes[2 * owner : 2 * owner + 2]
        members[number] = {"name": name, "status": rng.choice(list(FREE_BAGS)), "reservations": own}
        for code in own:
            reservations[code] = {
                "code": code,
                "member": number,
                "flight": rng.choice(list(flights)[:-1]),
                "cabin": rng.choice(CABINS),
                "passengers": rng.randrange(1, 4),
                "bags": rng.randrange(3),
                "insured": rng.random() < 0.3,
                "booked_on_day": TODAY - rng.randrange(40),
                "status": "booked",
                "paid": 0,
            }
    owner = rng.randrange(3)
    return {"members": members, "reservations": reservations, "flights": flights}, numbers[owner], codes[2 * owner]


TOOLS = (
    get_member,
    get_reservation,
    search_flights,
    change_flight,
    change_cabin,
    cancel_reservation,
    add_bags,
    deny_request,
)
WORLD = WorldDefinition("airline-mini", POLICY, TOOLS, plan)
AirlineMini = WORLD.environment("1")
