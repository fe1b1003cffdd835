# What a container must see of the machine. train_llama_hft.sbatch sources this file where a container runs.
#
# shellcheck shell=bash

# Prints a line FROM:TO for every mount that WORDS need, options and their values alike, and those in YAML files among them:
# files and folders, the folders of globs and of preprocessed data, the nearest folder that exists of what is yet to be
# written, and what links in all of these lead to, such as the blobs of Hugging Face's cache. The working folder is always
# one: relative paths mean the same inside.
needed_mounts() { # WORDS...
    local -A REAL=() LITERAL=()
    local word inner
    note_mount "$PWD"
    for word in "$@"; do
        [[ $word != --*=* ]] || word=${word#*=}
        note_path "$word"
        if [[ -f $word && $word =~ \.ya?ml$ ]]; then
            while IFS= read -r inner; do note_path "$inner"; done < <(tr -s "[:space:],\"'[]{}" '\n' <"$word")
        fi
    done
    local path
    {
        for path in "${!REAL[@]}"; do
            is_below_a_mount "$(dirname "$path")" || echo "$path:$path"
        done
        for path in "${!LITERAL[@]}"; do
            is_below_a_mount "$path" || echo "${LITERAL[$path]}:$path"
        done
    } | sort
}

# Notes what WORD means, if it is a path. A word that only looks like one costs a mount and nothing else.
note_path() { # WORD
    local word=$1 found
    case $word in
        "" | -*) return ;;
        *[\*\?\[]*)
            found=${word%%[\*\?\[]*}
            [[ $found == */* ]] || found=./
            note_mount "${found%/*}/"
            while IFS= read -r found; do note_links "$found"; done < <(shopt -s globstar && compgen -G "$word")
            ;;
        *)
            if [[ -e $word ]]; then
                note_mount "$word"
                note_links "$word"
            elif [[ -e $word.bin || -e $word.idx ]]; then
                note_mount "$(dirname "$word")"
                while IFS= read -r found; do note_links "$found"; done < <(compgen -G "$word*")
            elif [[ $word == */* ]]; then
                while [[ ! -e $word ]]; do word=$(dirname "$word"); done
                note_mount "$word"
            fi
            ;;
    esac
}

note_mount() { # PATH
    local literal real
    literal=$(realpath --no-symlinks "$1")
    real=$(realpath "$1")
    # Not the machine's root, to which a path leads where nothing of it exists.
    [[ $real != / ]] || return 0
    if [[ $literal$real == *[,:]* ]]; then
        echo "hft-megatron: error: $1 has a comma or a colon in its name, which no mount can have; rename it, or link to it." >&2
        exit 2
    fi
    REAL[$real]=1
    [[ $literal == "$real" ]] || LITERAL[$literal]=$real
}

# Notes the folders of what a link, or the links in a folder, lead to.
note_links() { # PATH
    local link
    while IFS= read -r link; do
        [[ ! -e $link ]] || note_mount "$(dirname "$(realpath "$link")")"
    done < <(find "$1" "$1/" -maxdepth 1 -type l 2>/dev/null)
}

is_below_a_mount() { # PATH
    local path=$1
    while [[ $path != / ]]; do
        [[ -z ${REAL[$path]:-} ]] || return 0
        path=$(dirname "$path")
    done
    return 1
}
