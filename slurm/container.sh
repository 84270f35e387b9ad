# What srun is told where a job runs in a container (pyxis and enroot); job.sh sources this, in a job and before one.
# ICRL_CONTAINER    a squashfs file that every node sees, or an image of a registry (nvcr.io#nvidia/pytorch:25.08-py3)
# ICRL_MOUNTS       more mounts, pyxis's SRC:DST[:FLAGS][,...]: what the settings name and no word of the command line does
# Sets `container`, which stands before a command: empty without ICRL_CONTAINER. What cannot work ends with code 2.
container=() mounts=()

# RANK and its relatives: for an image with PYTORCH_VERSION pyxis and enroot set them, as if each task were a rank.
# PYTHONPATH: the packages of this checkout, not those that were installed when the image was built.
inside='unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT
export PYTHONPATH=$PWD:$PWD/kernels:$PWD/recipes${PYTHONPATH:+:$PYTHONPATH}; exec "$@"'

refuse() { echo "error: ICRL_CONTAINER=$ICRL_CONTAINER: $1" >&2; exit 2; }

find_image() {  # sets `image`
  image=$ICRL_CONTAINER
  [[ $(srun --help 2>&1) == *--container-image* ]] ||
    refuse "srun knows no --container-image on $(hostname), so pyxis is missing there; unset it to run without a container"
  [ -f "$image" ] || [[ $image =~ ^[./]|\.(sqsh|squashfs)$ ]] || return 0
  # pyxis asks Docker Hub for what begins with neither / nor a dot.
  [[ $image == /* ]] || image=$PWD/$image
  [ -r "$image" ] ||
    refuse "no such file on $(hostname), or not yours to read; \`enroot import\` makes it, on a file system that all nodes share"
  [ "$(head -c 4 "$image" | tr -d '\0')" = hsqs ] || refuse "no squashfs image; make one with \`enroot import -o NAME.sqsh\`"
}

mounted() {  # path: is it in the container already?
  local mount
  for mount in "${mounts[@]}"; do
    mount=${mount#*:}  # SRC:DST:FLAGS, or SRC alone
    [[ $1/ == "${mount%%:*}"/* ]] && return
  done
  return 1
}

contain() {  # words of the command line: sets `container`; the folders that they name are mounted from then on
  [ -n "${ICRL_CONTAINER:-}" ] || return 0
  local word folder names
  for word in "${ICRL_LOGS:-$PWD}" "$@"; do
    case $word in
      /* | run_dir=/* | model.path=/* | start_from=/*) folder=${word#*=} ;;
      *) continue ;;
    esac
    # A run folder may not be there yet. Nothing of the host's takes the place of the image's own top folders.
    while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
    [[ $folder =~ ^/(|bin|dev|etc|lib|lib64|opt|proc|run|sbin|sys|tmp|usr|var)$ ]] || mounted "$folder" ||
      mounts+=("$folder:$folder")
  done
  # An image's own value would win over the job's; of all other variables too, but those are meant for it.
  names='^((ICRL|NCCL|GLOO|HF|WANDB|TRITON|SGLANG|NVTE)_|OMP_NUM_THREADS$|CUDA_DEVICE_MAX_CONNECTIONS$)'
  names=$(compgen -e | grep -E "$names" | paste -sd ,)
  # Writable: triton and SGLang compile into the home folder. What is written outside of mounts ends with the step.
  container=(--container-image="$image" --container-mounts="$(IFS=,; echo "${mounts[*]}")" --container-workdir="$PWD"
    --container-writable ${names:+--container-env="$names"} bash -c "$inside" inside)
}

if [ -n "${ICRL_CONTAINER:-}" ]; then
  find_image
  IFS=, read -r -a mounts <<< "$PWD:$PWD${ICRL_MOUNTS:+,$ICRL_MOUNTS}"
fi
