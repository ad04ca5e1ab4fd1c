"""Extend a LLaMA tokenizer with new pieces.

    python init_tokenizer.py --source_tokenizer_dir llama-2-7b \\
        --target_tokenizer_dir tokenizer-zh --expand_tokens_file new_tokens.jsonl

The same command as `python colossal_llama2/tokenizer/init_tokenizer.py`.
"""

from colossal_llama2.tokenizer.init_tokenizer import main

if __name__ == "__main__":
    main()
