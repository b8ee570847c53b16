"""The split of the demo's text: nothing held out was trained on."""

from benchmarks.registry.corpus import split


def test_held_out_articles_share_no_thirteen_words_with_training_text() -> None:
    articles = {f"title {i}": " ".join(f"word{i}-{j}" for j in range(30)) for i in range(200)}
    quoted = {f"copy of {title}": f"An opening. {text} An end." for title, text in articles.items()}
    training, held = split(articles | quoted)
    assert len(training) == 360
    held_words = [text.replace(",", "").split() for text in held]
    for words in held_words:
        for text in training:
            trained = text.split()
            runs = {tuple(trained[k : k + 13]) for k in range(len(trained) - 12)}
            assert runs.isdisjoint(tuple(words[k : k + 13]) for k in range(len(words) - 12))


def test_an_article_whose_twin_is_trained_on_is_dropped_even_when_short() -> None:
    articles = {f"title {i}": "the same few words" for i in range(40)}
    training, held = split(articles)
    assert (len(training), held) == (36, [])


def test_the_split_does_not_depend_on_order() -> None:
    articles = {f"title {i}": " ".join(f"w{i}x{j}" for j in range(20)) for i in range(50)}
    assert split(articles) == split(dict(reversed(articles.items())))
    assert len(split(articles)[1]) == 5
