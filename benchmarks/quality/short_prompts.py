"""What the router makes of short prompts: questions that no module is for, and beginnings of the domains' test texts.

python -m benchmarks.quality.short_prompts --store STORE --data DIR

STORE has a module for some of the domains in DIR, under their names. `--general-text` shows a copy of the router the
general sample that is shipped with this growlm; without it the store is as it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from growlm import Engine, Store
from growlm import data as text_data
from growlm.training.general import ensure_general

NONE = [
    "What is the capital of France?", "How do I boil an egg?", "Who wrote Hamlet?", "Write a poem about the sea.",
    "What time is it in Tokyo?", "Explain how photosynthesis works.", "Hello", "Hi, how are you?", "Tell me a joke.",
    "What's a good name for a cat?", "Translate 'good morning' into Spanish.", "How tall is Mount Everest?",
    "Summarise this text in one sentence.", "What should I cook tonight?",
    "Can you help me write an email to my landlord?", "Why is the sky blue?", "The weather today is",
    "My favourite film is", "I went to the shop and", "Give me three tips for sleeping better.",
    "Who won the football world cup in 1998?", "What is the tallest building in the world?",
    "How many continents are there?", "When was the first computer built?", "What do penguins eat?",
    "Explain the rules of chess to a beginner.", "Who is the president of Mexico?",
    "What is the boiling point of water in Fahrenheit?", "Describe Paris in one paragraph.", "How do airplanes fly?",
    "What are some famous museums in London?", "Write a short story about a dragon.", "What is machine learning?",
    "Who discovered America?", "How can I learn to play the guitar?", "Recommend a book for a long flight.",
    "What causes earthquakes?", "Convert 10 miles to kilometres.", "What is the population of India?",
    "Was ist die Hauptstadt von Spanien?",
]  # fmt: skip
MEDICAL = [
    "What are the symptoms of diabetes?", "What causes high blood pressure?", "How is asthma treated?",
    "What is the dose of ibuprofen for a child?", "Is lupus inherited?", "What are the treatments for kidney stones?",
    "How to diagnose pneumonia?", "A 45-year-old man presents with chest pain.",
]  # fmt: skip
TEXTS, LENGTHS = 24, (12, 32)  # documents of a domain, and tokens of their beginnings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="a folder a domain, with test.txt")
    parser.add_argument("--general-text", action="store_true", help="a copy of it, with the shipped sample shown anew")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        found = Store.open(a.store)
        if a.general_text:
            to = Path(work, "copy")
            shutil.copytree(a.store, to, ignore=shutil.ignore_patterns("work", "lock", "scratch"))
            told = json.loads((to / "store.json").read_text())
            (to / "store.json").write_text(json.dumps({**told, "base": str((a.store / told["base"]).resolve())}))
            found = Store.open(to)
            ensure_general(found, found.load_base(), found.load_tokenizer())
        with Engine(found) as engine:
            tell("short questions, of no module", [(engine.route(prompt).module, None) for prompt in NONE])
            if "medical_qa" in found.modules:
                tell("short questions of medicine", [(engine.route(p).module, "medical_qa") for p in MEDICAL])
            for length in LENGTHS:
                chosen = []
                for name in found.modules:
                    documents = text_data.read([a.data / name / "test.txt"], separator="\n\n").documents
                    for document in documents[:: max(len(documents) // TEXTS, 1)][:TEXTS]:
                        ids = engine.tokenizer(document.text[:600])["input_ids"][:length]
                        chosen.append((engine.route(ids).module, name))
                tell(f"beginnings of test documents, {length} tokens", chosen)


def tell(what: str, chosen: list[tuple[str | None, str | None]]) -> None:
    print(f"{what}: {sum(found == wanted for found, wanted in chosen)} of {len(chosen)}", flush=True)


if __name__ == "__main__":
    main()
