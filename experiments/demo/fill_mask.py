"""Print the three likeliest words for a mask, from an exported masked language model, in several languages.

    python experiments/demo/fill_mask.py --model demo/model

`import ksub_ds` is all that transformers' Auto classes need to know the model.
"""

import argparse

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

import ksub_ds  # noqa: F401 - registers the model with the Auto classes

SENTENCES = [
    "The baker bakes {mask} in the bakery.",
    "Der Bauer erntet {mask} auf dem Feld.",
    "Le chanteur {mask} une nouvelle chanson.",
    "Врач лечит {mask} в больнице.",
    "Ο ψαράς πιάνει {mask} στη θάλασσα.",
    "الخباز {mask} الخبز في المخبز.",
    "किसान खेत में {mask} उगाता है।",
    "Balıkçı denizde {mask} tutar.",
    "谁浇草？{mask}。",
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Fill masks with an exported model.")
    parser.add_argument("--model", required=True, help="a folder written by `ksub export`")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForMaskedLM.from_pretrained(options.model).eval()
    for sentence in SENTENCES:
        encoded = tokenizer(sentence.format(mask=tokenizer.mask_token), return_tensors="pt")
        position = (encoded["input_ids"][0] == tokenizer.mask_token_id).nonzero().item()
        with torch.no_grad():
            logits = model(input_ids=encoded["input_ids"]).logits[0, position]
        likeliest = logits.softmax(-1).topk(3)
        words = [tokenizer.decode([token]).strip() for token in likeliest.indices]
        pairs = zip(words, likeliest.values.tolist(), strict=True)
        guesses = "   ".join(f"{word} {probability:.0%}" for word, probability in pairs)
        print(f"  {sentence.format(mask='___'):45} {guesses}")


if __name__ == "__main__":
    main()
