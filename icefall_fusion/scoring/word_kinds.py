"""What kind of word was won or lost: homophone, number, name or rare word, function word.
Knows: words of languages, counts of words. Must not know: who recognized them.
"""
from __future__ import annotations

from typing import Callable, Collection, Mapping, Optional

from icefall_fusion.scoring.wer import EPS
from icefall_fusion.text.language import ENGLISH, Language

#: In the order in which they are asked for: a word is of the first kind that fits.
KINDS = ("inserted", "deleted", "homophone", "number", "name or rare word", "function word", "other")
#: A word is rare that is at most so frequent, and whatever was counted once alone.
RARE = 2e-5

NUMBERS = frozenset(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand "
    "million billion first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth "
    "thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth thirtieth "
    "fortieth fiftieth sixtieth seventieth eightieth ninetieth hundredth thousandth millionth".split()
)
FUNCTION_WORDS = frozenset(
    "a an the this that these those my your his her its our their mine yours hers ours theirs whose some any "
    "no every each either neither both all half such what which who whom whoever whatever whichever i me you "
    "he him she it we us they them myself yourself himself herself itself ourselves themselves one's "
    "somebody anybody nobody everybody someone anyone everyone something anything nothing everything "
    "am is are was were be been being have has had having do does did doing done shall should will would can "
    "could may might must ought need dare not n't don't didn't doesn't isn't aren't wasn't weren't won't "
    "wouldn't can't couldn't shouldn't haven't hasn't hadn't i'm i've i'll i'd you're you've you'll you'd "
    "he's he'll he'd she's she'll she'd it's it'll we're we've we'll we'd they're they've they'll they'd "
    "that's there's what's who's let's and or but nor so yet for if then than as because since although "
    "though while whilst when whenever where wherever why how whether unless until till of in on at by to "
    "from with without within into onto upon over under above below between among amongst through throughout "
    "during before after behind beside besides beneath beyond against about around across along toward "
    "towards near off out up down away back there here very too also only just even quite rather almost "
    "never ever always often again still already now oh ah o".split()
)
_SPANISH_NUMBERS = frozenset(
    "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciséis "
    "diecisiete dieciocho diecinueve veinte veintiuno veintiún veintiuna veintidós veintitrés veinticuatro "
    "veinticinco veintiséis veintisiete veintiocho veintinueve treinta cuarenta cincuenta sesenta setenta "
    "ochenta noventa cien ciento doscientos doscientas trescientos trescientas cuatrocientos cuatrocientas "
    "quinientos quinientas seiscientos seiscientas setecientos setecientas ochocientos ochocientas "
    "novecientos novecientas mil millón millones primero primera primer segundo segunda tercero tercera "
    "tercer cuarto cuarta quinto quinta sexto sexta séptimo séptima octavo octava noveno novena décimo "
    "décima".split()
)
_SPANISH_FUNCTION_WORDS = frozenset(
    "el la los las lo un una unos unas al del de a en con por para sin sobre entre hasta desde hacia contra "
    "según tras ante bajo durante y e o u ni pero mas sino que si como cuando donde mientras porque pues "
    "aunque luego conque cual cuales quien quienes cuyo cuya cuyos cuyas cuanto cuanta cuantos cuantas qué "
    "quién quiénes cuál cuáles cómo cuándo dónde cuánto cuánta cuántos cuántas yo tú él ella ello nosotros "
    "nosotras vosotros vosotras ellos ellas usted ustedes me te se nos os le les mí ti sí conmigo contigo "
    "consigo mi mis tu tus su sus nuestro nuestra nuestros nuestras vuestro vuestra vuestros vuestras mío "
    "mía míos mías tuyo tuya suyo suya suyos suyas este esta esto estos estas ese esa eso esos esas aquel "
    "aquella aquello aquellos aquellas éste ésta éstos éstas ése ésa aquél aquélla algo alguien algún "
    "alguno alguna algunos algunas nada nadie ningún ninguno ninguna todo toda todos todas otro otra otros "
    "otras mismo misma mismos mismas tal tales cada ambos ambas mucho mucha muchos muchas poco poca pocos "
    "pocas tan tanto tanta tantos tantas más menos muy no también tampoco ya aún aun todavía siempre nunca "
    "jamás aquí ahí allí allá acá así bien mal casi sólo solo es era eran fue fueron ser sido soy eres "
    "somos son sea está están estaba estaban estar ha han había habían haber he hay hubo".split()
)
_MANDARIN_NUMBERS = frozenset("零〇一二三四五六七八九十百千万亿两半几第")
_MANDARIN_FUNCTION_WORDS = frozenset(
    "的了着过地得之也就都又很才还便却再不没在和与跟把被给向从对到于以因为而且但或若如虽所其这那此彼我你他她它们咱您谁甚么吗"
    "呢吧啊呀哩罢是有个些只等者乎矣焉哉"
)
_NUMBERS = {"en": NUMBERS, "es": _SPANISH_NUMBERS, "zh": _MANDARIN_NUMBERS}
_FUNCTION_WORDS = {"en": FUNCTION_WORDS, "es": _SPANISH_FUNCTION_WORDS, "zh": _MANDARIN_FUNCTION_WORDS}


class WordKinds:
    """Tells the kind of an error.

    Args:
        counts: of words in some text, to tell rare ones.
        names: words that are names.
        sounds: how a word sounds (None where that is not known); without it homophones are not told.
        language: of the words. Function words and numbers are known of English, Spanish and Mandarin (by
            characters); of others only numbers in digits are told, and no function words.

    Attributes:
        kinds: those of KINDS that are told.
    """

    def __init__(self, counts: Mapping[str, int], names: Collection[str] = (),
                 sounds: Optional[Callable[[str], Optional[str]]] = None,
                 language: Language = ENGLISH) -> None:
        self._counts, self._names, self.sounds = counts, frozenset(names), sounds
        self._numbers: Collection[str] = _NUMBERS.get(language.base, ())
        self._function_words: Collection[str] = _FUNCTION_WORDS.get(language.base, ())
        self.kinds = tuple(kind for kind in KINDS if kind != "function word" or self._function_words)
        self._rare = max(1.0, RARE * sum(counts.values()))

    def of_word(self, word: str) -> str:
        """Return the kind of a word by itself: one of the last four."""
        if word in self._numbers or any(letter.isdigit() for letter in word):
            return "number"
        if word in self._names:
            return "name or rare word"
        if word in self._function_words:
            return "function word"
        return "name or rare word" if self._counts.get(word, 0) <= self._rare else "other"

    def of_error(self, reference: str, wrong: str) -> str:
        """Return the kind of an error: the word of the reference and what was recognized; EPS for none."""
        if reference == EPS:
            return "inserted"
        if wrong == EPS:
            return "deleted"
        if self.sounds is not None and self.sounds(wrong) is not None:
            if self.sounds(reference) == self.sounds(wrong):
                return "homophone"
        return self.of_word(reference)
