"""The words that prompts are made of: each with its space is four bytes, and one token.

The vocabularies of published models have all of them; those that `deploy/airgap/make_model.py`
trains for models without weights learn them, or a prompt would be longer there than its trace says.
"""

_WORD_LIST = """\
ace act add age ago aid aim air all and ant any ape apt arc are arm art ash ask ate axe bad
bag ban bar bat bay bed bee bet bid big bin bit bow box boy bug bun bus but buy cab cam can
cap car cat cod cop cot cow cry cub cue cup cut dad dam day den dew did die dig dim dog dot
dry dub due dug ear eat egg elf elm end era eye fan far fat fax fed fee few fig fin fir fit
fix fly foe fog for fox fun fur gap gas gel gem get god got gum gun guy gym had ham has hat
hay hen her him hip his hit hop hot how hub hug hut ice icy ill ink inn ion its ivy jam jar
jaw jet job joy jug key kid kit lab law lay led leg let lid lie lip lit log lot low mad man
map mat may mix mom mud mug nap net new nor not now nut oak oat odd off oil old one orb our
out owl own pad pal pan paw pay pea peg pen per pet pie pig pin pit pod pop pot pre pro put
raw red rob rod row run sad sat say sea see set she sir sit six sky son sum sun tax tea ten
the tie tip toe ton too top toy try two use van via war was way web wet who why win won yes
yet you zip
"""
WORDS = tuple(_WORD_LIST.split())
assert len(WORDS) == len(set(WORDS)) == 256  # a byte chooses a word
