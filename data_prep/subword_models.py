"""Learn subword models and fairseq dictionaries from training text, into one folder.

A folder of subwords holds ``subwords.json`` (the settings) and, for each of ``joint`` or the two languages,
a model (``NAME.model`` of sentencepiece, ``NAME.codes`` of subword-nmt) and a fairseq dictionary
(``dict.txt`` of joint subwords, ``dict.LANGUAGE.txt`` of separate ones).
"""

import collections
import io
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import sentencepiece
from subword_nmt.apply_bpe import BPE
from subword_nmt.learn_bpe import learn_bpe

from data_prep.textio import DataError, read_lines, require_file
from xmoe_fairseq.files import open_aside

SETTINGS = "subwords.json"
FAIRSEQ_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
# fairseq uses only the order of a dictionary, which --srcdict takes from the file; its own recipes write 100 too.
COUNT = 100
MAX_LINE_BYTES = 16_384  # sentencepiece leaves longer lines out when learning


@dataclass(frozen=True)
class Settings:
    """How a folder of subwords was learned.

    Attributes:
        target: None for the text of one language.
        tool: ``sentencepiece`` or ``subword-nmt``.
        vocab_size: of each model, with sentencepiece's own <unk>, <s>, </s>.
        max_lines: lines used of each file, evenly spaced over it; 0 = all.
        character_coverage: share of the characters seen that get a piece; None = 0.9995 for zh, ja, else 1.
    """

    source: str
    target: str | None
    tool: str = "sentencepiece"
    joint: bool = True
    vocab_size: int = 32_000
    max_lines: int = 2_000_000
    character_coverage: float | None = None
    byte_fallback: bool = False
    split_digits: bool = False
    normalization: str = "nmt_nfkc"

    def name_for(self, language: str | None) -> str:
        """The name of a language's model; joint subwords need no language. Raises: DataError for an unknown one."""
        if language not in self.languages and not (language is None and self.joint):
            raise DataError(f"--language {language}: these subwords want {' or '.join(self.languages)}")
        return "joint" if self.joint or language is None else language

    def names(self) -> dict[str, list[str]]:
        """Languages by the model they share."""
        return {"joint": self.languages} if self.joint else {language: [language] for language in self.languages}

    @property
    def languages(self) -> list[str]:
        """The source language and, where there is one, the target language."""
        return [language for language in (self.source, self.target) if language is not None]


def dictionary_name(name: str) -> str:
    return "dict.txt" if name == "joint" else f"dict.{name}.txt"


def load_settings(folder: Path) -> Settings:
    path = folder / SETTINGS
    if not path.is_file():
        raise DataError(f"{path}: no such file; learn subwords first: xmoe prepare subwords learn --out {folder}")
    try:
        return Settings(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: not settings of subwords, or damaged ({error}); learn the subwords again") from None


def learn(inputs: Sequence[Path], folder: Path, settings: Settings) -> list[Path]:
    """Learn and write models, dictionaries and settings; on failure nothing is written.

    Args:
        inputs: training text of the source and, of parallel text, of the target language.
    Raises: DataError for missing text, or a vocabulary size the text cannot fill (it gives the largest).
    """
    results: dict[Path, bytes] = {}
    texts = dict(zip(settings.languages, inputs, strict=True))
    for path in inputs:
        require_file(path, "training text")
    for name, languages in settings.names().items():
        lines = itertools.chain.from_iterable(sampled_lines(texts[code], settings.max_lines) for code in languages)
        if settings.tool == "sentencepiece":
            model = learn_sentencepiece(lines, languages, settings)
            results[folder / f"{name}.model"] = model
            results[folder / dictionary_name(name)] = sentencepiece_dictionary(model)
        else:
            codes, dictionary = learn_subword_nmt(lines, languages, settings)
            results[folder / f"{name}.codes"] = codes
            results[folder / dictionary_name(name)] = dictionary
    results[folder / SETTINGS] = (json.dumps(asdict(settings), indent=2) + "\n").encode()
    with open_aside(list(results)) as files:
        for file, content in zip(files, results.values(), strict=True):
            file.write(content)
    return list(results)


def sampled_lines(path: Path, max_lines: int) -> Iterator[str]:
    """All lines, or ``max_lines`` of them evenly spaced, which are the same on every machine."""
    total = count_lines(path) if max_lines else 0
    with path.open("rb") as file:
        for number, raw in enumerate(read_lines(file)):
            if total > max_lines and number * max_lines // total == (number - 1) * max_lines // total:
                continue
            try:
                yield tidy(raw)
            except UnicodeDecodeError:
                raise DataError(f"{path}:{number + 1}: not valid UTF-8; check it with xmoe prepare validate") from None


def count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def tidy(raw: bytes) -> str:
    return " ".join(raw.decode().split())


def learn_sentencepiece(lines: Iterator[str], languages: Sequence[str], settings: Settings) -> bytes:
    """Learn a BPE model; equal text and settings give equal bytes. Returns: the serialised model.

    num_threads stays at sentencepiece's default, because the model file holds it and another number gives other bytes.
    """
    coverage = settings.character_coverage
    if coverage is None:
        coverage = 0.9995 if {"zh", "ja"} & set(languages) else 1.0
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=settings.vocab_size,
            character_coverage=coverage,
            byte_fallback=settings.byte_fallback,
            split_digits=settings.split_digits,
            normalization_rule_name=settings.normalization,
            max_sentence_length=MAX_LINE_BYTES,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(vocabulary_problem(settings.vocab_size, languages, str(error))) from None
    return model.getvalue()


def vocabulary_problem(size: int, languages: Sequence[str], message: str) -> str:
    """The error message for a vocabulary size that sentencepiece refuses."""
    where = f"--vocab-size {size} for {'+'.join(languages)}"
    if match := re.search(r"set it to a value <= (\d+)", message):
        return f"{where}: the text yields at most {match[1]}; give {match[1]} or less, or more text"
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        way_out = f"give more than {match[1]}, or lower --character-coverage"
        return f"{where}: the characters alone need {match[1]}; {way_out}"
    return f"{where}: sentencepiece failed: {message}"


def learn_subword_nmt(lines: Iterator[str], languages: Sequence[str], settings: Settings) -> tuple[bytes, bytes]:
    """Learn merges on whole words. Returns: the codes file and the fairseq dictionary (real counts)."""
    words = collections.Counter(word for line in lines for word in line.split(" ") if word)
    characters = len({c for word in words for c in word[:-1]}) + len({word[-1] for word in words})
    merges = settings.vocab_size - characters
    where = f"--vocab-size {settings.vocab_size} for {'+'.join(languages)}"
    if merges < 1:
        raise DataError(f"{where}: the characters alone need {characters}; give more than {characters}")
    vocabulary = io.StringIO("".join(f"{word} {count}\n" for word, count in sorted(words.items())))
    codes = io.StringIO()
    learn_bpe(vocabulary, codes, merges, is_dict=True)
    learned = codes.getvalue().count("\n") - 1  # the first line is the version
    if learned < merges:
        most = characters + learned
        raise DataError(f"{where}: the text yields at most {most}; give {most} or less, or more text")
    codes.seek(0)
    bpe, tokens = BPE(codes), collections.Counter[str]()
    for word, count in words.items():
        for token in bpe.segment_tokens([word]):
            tokens[token] += count
    ranked = sorted(tokens.items(), key=lambda item: (-item[1], item[0]))
    return codes.getvalue().encode(), dictionary_text(ranked).encode()


def dictionary_text(tokens: Sequence[tuple[str, int]]) -> str:
    """The tokens in fairseq's dictionary format; one that is spelled like a special token of fairseq is marked."""
    mark = dict.fromkeys(FAIRSEQ_SPECIALS, " #fairseq:overwrite")
    return "".join(f"{token} {count}{mark.get(token, '')}\n" for token, count in tokens)


def sentencepiece_dictionary(model: bytes) -> bytes:
    """A dictionary of all pieces that encoding can yield, in the model's order; fairseq adds its special tokens."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = [i for i in range(len(processor)) if not processor.is_control(i) and not processor.is_unknown(i)]
    return dictionary_text([(processor.id_to_piece(i), COUNT) for i in ids]).encode()
