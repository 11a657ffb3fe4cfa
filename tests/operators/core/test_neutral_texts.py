"""The sentences that ship."""

from operators.core.neutral_texts import neutral_texts


def test_there_are_sixteen_different_sentences() -> None:
    texts = neutral_texts()
    assert len(set(texts)) == len(texts) == 16
    assert all(text.strip() == text and text.endswith(".") for text in texts)
