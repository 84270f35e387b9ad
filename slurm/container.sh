# srun's options for a job in a container (pyxis and enroot); job.sh sources this in a job and in a check before it.
# ICRL_CONTAINER    a squashfs file that every node can read, or a registry image (nvcr.io#nvidia/pytorch:25.08-py3)
# ICRL_MOUNTS       more mounts, pyxis's SRC:DST[:FLAGS][,...]: folders in settings that the command line does not name
# Sets `container`, a prefix for commands: empty without ICRL_CONTAINER. A configuration that cannot work exits with code 2.
container=() mounts=()

# RANK and the others: if the image has PYTORCH_VERSION, pyxis and enroot set them as if each task were a rank.
# PYTHONPATH: the packages of this checkout, not those installed in the image.
inside='unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT
export PYTHONPATH=$PWD:$PWD/kernels:$PWD/recipes${PYTHONPATH:+:$PYTHONPATH}; exec "$@"'

refuse() { echo "error: ICRL_CONTAINER=$ICRL_CONTAINER: $1" >&2; exit 2; }

find_image() {  # sets `image`
  image=$ICRL_CONTAINER
  [[ $(srun --help 2>&1) == *--container-image* ]] ||
    refuse "srun knows no --container-image on $(hostname), so pyxis is missing there; unset it to run without a container"
  [ -f "$image" ] || [[ $image =~ ^[./]|\.(sqsh|squashfs)$ ]] || return 0
  # pyxis looks for names that begin with neither / nor a dot on Docker Hub.
  [[ $image == /* ]] || image=$PWD/$image
  [ -r "$image" ] ||
    refuse "no such file on $(hostname), or it is not readable; create it with \`enroot import\` on a file system that all nodes share"
  [ "$(head -c 4 "$image" | tr -d '\0')" = hsqs ] || refuse "no squashfs image; create one with \`enroot import -o NAME.sqsh\`"
}

mounted() {  # path: succeeds if a mount already contains it
  local mount
  for mount in "${mounts[@]}"; do
    mount=${mount#*:}  # SRC:DST:FLAGS, or SRC alone
    [[ $1/ == "${mount%%:*}"/* ]] && return
  done
  return 1
}

contain() {  # words of the command line: sets `container`, and adds mounts for the folders that the words name
  [ -n "${ICRL_CONTAINER:-}" ] || return 0
  local word folder names
  for word in "${ICRL_LOGS:-$PWD}" "$@"; do
    case $word in
      /* | run_dir=/* | model.path=/* | start_from=/*) folder=${word#*=} ;;
      *) continue ;;
    esac
    # A run folder may not exist yet. The image's own top-level folders are never covered by a mount.
    while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
    [[ $folder =~ ^/(|bin|dev|etc|lib|lib64|opt|proc|run|sbin|sys|tmp|usr|var)$ ]] || mounted "$folder" ||
      mounts+=("$folder:$folder")
  done
  # Without --container-env the image's value of a variable overrides the job's, which is intended for all other variables.
  names='^((ICRL|NCCL|GLOO|HF|WANDB|TRITON|SGLANG|NVTE)_|OMP_NUM_THREADS$|CUDA_DEVICE_MAX_CONNECTIONS$)'
  names=$(compgen -e | grep -E "$names" | paste -sd ,)
  # Writable: triton and SGLang compile into the home folder. Files outside of mounts are lost when the step ends.
  container=(--container-image="$image" --container-mounts="$(IFS=,; echo "${mounts[*]}")" --container-workdir="$PWD"
    --container-writable ${names:+--container-env="$names"} bash -c "$inside" inside)
}

if [ -n "${ICRL_CONTAINER:-}" ]; then
  find_image
  IFS=, read -r -a mounts <<< "$PWD:$PWD${ICRL_MOUNTS:+,$ICRL_MOUNTS}"
fi
