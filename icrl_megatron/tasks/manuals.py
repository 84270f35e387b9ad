"""The manuals (`base.Environment`) of AgentGym's environments: what each is, and all its actions.

Capital words stand for what the model puts there.
"""

from __future__ import annotations

from collections.abc import Mapping

FORM = "End each reply with one action between tags: <action>ACTION</action>."

ALFWORLD = f"""\
The task is a chore in a household. Things lie on or in numbered receptacles (desk 1, fridge 1, drawer 2), and you see \
only what is where you stand. A closed receptacle must be opened before you can see or take what it holds. You can \
carry one thing. A chore may ask for a thing that is clean, hot or cool, for two things, or to look at a thing under a \
lamp.

Actions:
go to RECEPTACLE
open RECEPTACLE
close RECEPTACLE
take THING from RECEPTACLE
put THING in/on RECEPTACLE (in newer versions: move THING to RECEPTACLE)
clean THING with RECEPTACLE (a sink)
heat THING with RECEPTACLE (a microwave)
cool THING with RECEPTACLE (a fridge)
slice THING with THING (a knife)
use THING (switches a lamp on)
examine THING or RECEPTACLE
look
inventory

A list of available actions, where you get one, has the valid words and numbers; take them from there. "Nothing \
happens." means that an action had no effect. {FORM}"""

WEBSHOP = f"""\
The task is to buy a product in a web shop. The instruction names what it must be and its highest price. A search \
lists products; a product has a page, on which you choose options such as color and size before you buy. Buying ends \
the attempt, and its reward is how well product, options and price match the instruction.

Actions:
search[WORDS] (only on a page with a search bar)
click[ELEMENT] (an element of the current page, as it is written there): a product's code, an option, Description, \
Features, Reviews, Next >, < Prev, Back to Search, or Buy Now

An action that the page does not have changes nothing. {FORM}"""

SCIWORLD = f"""\
The task is an experiment in a building with several rooms. Its steps give points, and so the order may matter. Some \
tasks end at once if you focus on the wrong thing.

Actions:
look around
look at THING
look in THING
go to PLACE
open THING
close THING
pick up THING
put down THING
move THING to THING
pour THING into THING
dunk THING into THING
mix THING
use THING, or use THING on THING
activate THING
deactivate THING
connect THING to THING
disconnect THING
read THING
eat THING
flush THING
focus on THING (names the thing that the task is about)
wait (10 steps)
wait1 (1 step)
task (shows the task)
inventory

If the answer is a numbered list of meanings, reply with the number as the action. {FORM}"""

BABYAI = f"""\
The task is to reach a goal in a world of rooms on a grid, such as to stand beside a ball or to open a door. You see \
what is in front of you and to both sides, and things have a number (red ball 1). Locked doors open with a key of \
their color.

Actions:
turn left
turn right
move forward
go to THING NUMBER
pick up THING NUMBER
go through DOOR NUMBER (an open door)
toggle and go through DOOR NUMBER (a closed door, or a locked one if you carry its key)
toggle (opens or closes the door right in front of you)

{FORM}"""

TEXTCRAFT = f"""\
The task is to craft an item. You get the recipes that you may use; an ingredient has a recipe of its own or can be \
fetched. Where a recipe names a kind (planks), any item of that kind will do.

Actions:
get COUNT ITEM (fetches an ingredient that needs no crafting)
craft COUNT ITEM using COUNT ITEM, COUNT ITEM (as a recipe says)
inventory

{FORM}"""

SEARCHQA = """\
The task is a question, which may need facts from several pages. A search answers with passages of an encyclopedia \
between <information> tags. The answer is compared with the expected one, so it must be short: a name, a date, yes or \
no.

Actions:
<search>WORDS</search>
<answer>ANSWER</answer> (ends the attempt)

End each reply with one of them."""

MANUALS: Mapping[str, str] = {
    "alfworld": ALFWORLD,
    "webshop": WEBSHOP,
    "sciworld": SCIWORLD,
    "babyai": BABYAI,
    "textcraft": TEXTCRAFT,
    "searchqa": SEARCHQA,
}
