import sys
from _old import runtime as _old

positive = _old.positive


def shared(doc, tunings=None, **defaults):
    parser = _old.shared_flags(doc, tunings, **defaults)
    parser.conflict_handler = "resolve"  # shim alone: --sentinels is shared today, and the Qwen script's own tomorrow
    return parser


def parse(parser, argv):
    argv = sys.argv[1:] if argv is None else argv
    args = _old.parse_flags(parser, argv)
    args.command = argv
    return args


def adopt(args, saved, source):
    """Settings that a saved model is bound to, printed where they are not those given."""
    for name, value in saved.items():
        if getattr(args, name) != value:
            print(f"{name} {value} (from {source})")
            setattr(args, name, value)
