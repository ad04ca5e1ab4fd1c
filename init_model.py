"""Initialize the embeddings of new tokens from those of the source model.

    python init_model.py --source_model_and_tokenizer_path llama-2-7b \\
        --target_tokenizer_path tokenizer-zh --target_model_path llama-2-7b-zh

The same command as `python colossal_llama2/model/init_model.py`.
"""

from colossal_llama2.model.init_model import main

if __name__ == "__main__":
    main()
